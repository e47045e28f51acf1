"""The loop that times steps, under a clock that stands still unless told to move."""

from itertools import pairwise
from typing import Any

import pytest
from vqbet_bench.timing import WARM_UP_CALLS, WARM_UP_SECONDS, RoundPlan, run_round


class FakeClock:
    def __init__(self) -> None:
        self.time, self.sleeps = 100.0, []

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.sleeps.append(moment)
        self.time = max(self.time, moment)


class FakePolicy:
    """Takes `replan` seconds on every `chunk`-th step, else `queue`; preparing takes longer."""

    chunk = 5

    def __init__(self, replan: float = 0.010, queue: float = 0.001, prepare: float = 0.0) -> None:
        self.clock, self.times = FakeClock(), (replan, queue)
        self.prepare_seconds = prepare

    def start(self, *, every: bool) -> None:
        self.every, self.steps = every, 0

    def prepare(self, step: int) -> int:
        assert step == self.steps
        self.clock.time += self.prepare_seconds
        return step

    def act(self, _observation: int) -> None:
        planned = self.every or self.steps % self.chunk == 0
        self.clock.time += self.times[not planned]
        self.steps += 1

    def stages(self) -> dict[str, float]:
        return {"gpt": 0.008}


def play(
    mode: Any, seconds: float = 1.0, rate: float = 50.0, min_replans: int = 1, **times: float
) -> Any:
    policy = FakePolicy(**times)
    return run_round(policy, RoundPlan(mode, seconds, min_replans, rate), policy.clock), policy


def test_steps_that_predict_are_told_from_queued_ones_and_preparing_is_not_timed() -> None:
    played, _ = play("back_to_back", prepare=0.5, seconds=40)
    assert played.replan == pytest.approx([0.010] * len(played.replan))
    assert played.queue == pytest.approx([0.001] * len(played.queue))
    assert len(played.queue) == pytest.approx(4 * len(played.replan), abs=4)
    assert played.responses == []
    assert played.ended - played.began >= 40
    assert played.stages == {"gpt": [0.008] * len(played.replan)}


def test_warming_up_takes_enough_calls_and_enough_time() -> None:
    played, policy = play("back_to_back", replan=0.0001, queue=0.0001, seconds=0.001)
    warm = policy.steps - played.actions
    assert warm >= WARM_UP_CALLS
    assert played.began - 100.0 >= WARM_UP_SECONDS - 1e-9
    assert warm % policy.chunk == 0
    assert policy.clock.sleeps == []


def test_re_planning_on_every_step() -> None:
    played, policy = play("every")
    assert policy.every
    assert played.queue == []
    assert len(played.replan) == 100


def test_a_round_goes_on_until_enough_chunks_were_predicted() -> None:
    assert len(play("back_to_back", seconds=0.001, min_replans=13)[0].replan) == 13


def test_a_late_step_delays_the_next_ones_but_not_the_schedule() -> None:
    """50 ms instead of 20: the next two ticks have passed when it ends; then it has caught up."""
    played, policy = play("paced", rate=50, seconds=2, replan=0.050, queue=0.001)
    ticks = policy.clock.sleeps
    gaps = [after - before for before, after in pairwise(ticks)]
    assert gaps == pytest.approx([0.02] * len(gaps))
    assert played.responses[:5] == pytest.approx([0.050, 0.031, 0.012, 0.001, 0.001])
    assert played.actions == pytest.approx(100, abs=5)
    assert played.replan == pytest.approx([0.050] * len(played.replan))


def test_a_policy_slower_than_the_rate_falls_ever_further_behind() -> None:
    responses = play("paced", rate=1000, seconds=1, replan=0.01, queue=0.01)[0].responses
    assert responses == sorted(responses)
    assert min(responses) > 0.001
