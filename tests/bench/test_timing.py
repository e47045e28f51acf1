"""The loop that times steps, under a clock that stands still unless told to move."""

from typing import Any

import pytest
from vqbet_bench.timing import WARM_UP_CALLS, WARM_UP_SECONDS, RoundPlan, run_round


class FakeClock:
    def __init__(self) -> None:
        self.time = 100.0
        self.sleeps = []

    def now(self) -> Any:
        return self.time

    def sleep_until(self, moment: Any) -> None:
        self.sleeps.append(moment)
        self.time = max(self.time, moment)


class FakePolicy:
    """Takes `replan` seconds on every `chunk`-th step, else `queue`; preparing takes longer."""

    def __init__(
        self,
        clock: Any,
        chunk: Any = 5,
        replan: Any = 0.010,
        queue: Any = 0.001,
        prepare: Any = 0.0,
    ) -> None:
        self.clock, self.chunk, self.replan, self.queue = clock, chunk, replan, queue
        self.prepare_seconds = prepare
        self.steps, self.every, self.starts = 0, False, 0

    def start(self, *, every: Any) -> None:
        self.every, self.steps = every, 0
        self.starts += 1

    def prepare(self, step: Any) -> Any:
        assert step == self.steps
        self.clock.time += self.prepare_seconds
        return step

    def act(self, _observation: Any) -> None:
        planned = self.every or self.steps % self.chunk == 0
        self.clock.time += self.replan if planned else self.queue
        self.steps += 1

    def stages(self) -> Any:
        return {"gpt": 0.008}


def play(
    mode: Any, seconds: Any = 1.0, rate: Any = 50.0, min_replans: Any = 1, **timing: Any
) -> Any:
    clock = FakeClock()
    policy = FakePolicy(clock, **timing)
    return run_round(policy, RoundPlan(mode, seconds, min_replans, rate), clock), policy, clock


def test_steps_that_predict_are_told_from_queued_ones() -> None:
    played, _, _ = play("back_to_back")
    assert played.replan == pytest.approx([0.010] * len(played.replan))
    assert played.queue == pytest.approx([0.001] * len(played.queue))
    assert len(played.queue) == pytest.approx(4 * len(played.replan), abs=4)
    assert played.responses == []
    assert played.ended - played.began >= 1.0
    assert played.stages == {"gpt": [0.008] * len(played.replan)}


def test_warming_up_takes_enough_calls_and_enough_time() -> None:
    played, policy, clock = play("back_to_back", replan=0.0001, queue=0.0001, seconds=0.001)
    warm = policy.steps - played.actions
    assert warm >= WARM_UP_CALLS
    assert played.began - 100.0 >= WARM_UP_SECONDS - 1e-9
    assert warm % policy.chunk == 0
    assert clock.sleeps == []


def test_preparing_an_observation_is_not_timed() -> None:
    played, _, _ = play("back_to_back", prepare=0.5, seconds=3)
    assert max(played.replan) < 0.011


def test_re_planning_on_every_step() -> None:
    played, policy, _ = play("every")
    assert policy.every
    assert played.queue == []
    assert len(played.replan) == 100


def test_a_round_goes_on_until_enough_chunks_were_predicted() -> None:
    played, _, _ = play("back_to_back", seconds=0.001, min_replans=13)
    assert len(played.replan) == 13


def test_a_paced_round_keeps_to_an_absolute_schedule() -> None:
    played, _, clock = play("paced", rate=50, seconds=2)
    steps = [after - before for before, after in zip(clock.sleeps, clock.sleeps[1:], strict=False)]
    assert steps == pytest.approx([0.02] * len(steps))
    assert played.actions == pytest.approx(100, abs=1)
    assert max(played.responses) == pytest.approx(0.010)


def test_a_late_step_delays_the_next_ones_but_not_the_schedule() -> None:
    """50 ms instead of 20: the two next ticks have passed when it ends, then the loop has
    caught up."""
    played, _, _ = play("paced", rate=50, seconds=2, replan=0.050, queue=0.001)
    first = played.responses[:5]
    assert first == pytest.approx([0.050, 0.031, 0.012, 0.001, 0.001])
    missed = sum(response > 0.02 for response in played.responses)
    assert missed == pytest.approx(2 / 5 * played.actions, abs=2)
    assert played.replan == pytest.approx([0.050] * len(played.replan))


def test_a_policy_slower_than_the_rate_falls_ever_further_behind() -> None:
    played, _, _ = play("paced", rate=1000, seconds=1, replan=0.01, queue=0.01)
    assert played.responses[-1] > played.responses[0]
    assert all(response > 0.001 for response in played.responses)
