"""`EdgePolicy` with its guards."""

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from miniature import HIGH, LOW, STATE
from torture import cases

from vqbet_edge import (
    BackendError,
    ConcurrentUseError,
    DeadlineError,
    EdgePolicy,
    ForkError,
    Guards,
    HistoryError,
    NonFiniteError,
    ObservationError,
    StaleObservationError,
    UsageError,
)

Observations = list[dict[str, np.ndarray]]


def load(mini: Path, guards: Guards | None = None, **options: Any) -> EdgePolicy:
    return EdgePolicy.load(mini, backend="onnxruntime", guards=guards, **options)


@pytest.fixture(scope="module")
def observations() -> Observations:
    random = np.random.default_rng(8)
    return [miniature.observation(random) for _ in range(60)]


def stretched(policy: EdgePolicy, factor: float) -> None:
    """Let the offsets be as large as an untrained or overflowing network might make them."""
    predict, replan = policy._window.graphs.predict, policy._window.graphs.replan

    def larger(outputs: Any) -> Any:
        outputs.offsets[...] *= np.float32(factor)
        return outputs

    policy._window.graphs.predict = lambda states: larger(predict(states))  # type: ignore[method-assign]
    policy._window.graphs.replan = lambda *a, **k: larger(replan(*a, **k))  # type: ignore[method-assign]


def test_actions_stay_within_the_training_datas_range(
    mini: Path, observations: Observations, caplog: pytest.LogCaptureFixture
) -> None:
    policy, plain = load(mini), load(mini, Guards(action_limits=None))
    stretched(policy, 1e4)
    stretched(plain, 1e4)
    low, high = LOW - 0.1 * (HIGH - LOW), HIGH + 0.1 * (HIGH - LOW)
    escaped = 0
    with caplog.at_level(logging.WARNING, "vqbet_edge"):
        for observation in observations:
            action, free = policy.act(observation), plain.act(observation)
            np.testing.assert_allclose(action, np.clip(free, low, high), rtol=1e-6)
            escaped += bool((free != action).any())
    assert escaped > len(observations) // 2
    assert policy.guard_counts.clamped >= escaped
    assert plain.guard_counts == (0, 0, 0, 0)
    assert sum("left the limits" in record.message for record in caplog.records) == 1
    assert policy.last is not None
    assert policy.last.clamped.shape == policy.last.decoded_chunk.shape
    assert policy.last.clamped.any()


def test_no_action_escapes_adversarial_observations(mini: Path) -> None:
    limits = ((-0.5, 20.0), (0.25, 30.0))
    policy, random = (
        load(mini, Guards(action_limits=limits), replan_every=1),
        np.random.default_rng(9),
    )
    stretched(policy, 300)
    acted, count = 0, cases(500, 100_000)
    for case in range(count):
        observation = miniature.observation(random)
        scale = np.float32(10.0 ** random.uniform(-40, 38))
        observation[STATE] = random.normal(0, 1, 2).astype(np.float32) * scale
        if case % 3 == 0:
            observation[miniature.IMAGE][:] = random.choice([0, 255])
        try:
            with np.errstate(all="ignore"):
                action = policy.act(observation)
        except (ObservationError, NonFiniteError):
            policy.reset()
            continue
        assert ((action >= limits[0]) & (action <= limits[1])).all()
        acted += 1
    assert acted > count // 2
    assert policy.guard_counts.clamped > acted // 2


@pytest.mark.parametrize("where", ["logits", "offsets", "table"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_not_a_number_is_always_raised(
    mini: Path, observations: Observations, where: str, value: float, temperature: float
) -> None:
    policy = load(mini, temperature=temperature, replan_every=1)
    policy.act(observations[0])
    predict, replan, random = (
        policy._window.graphs.predict,
        policy._window.graphs.replan,
        np.random.default_rng(0),
    )

    def spoil(outputs: Any) -> Any:
        array = {"logits": outputs.logits, "offsets": outputs.offsets}[where]
        array.flat[random.integers(array.size)] = value
        return outputs

    if where == "table":
        assert policy._planner._table is not None
        policy._planner._table = np.full_like(policy._planner._table, value)
    else:
        policy._window.graphs.predict = lambda states: spoil(predict(states))  # type: ignore[method-assign]
        policy._window.graphs.replan = lambda *a, **k: spoil(replan(*a, **k))  # type: ignore[method-assign]
    for observation in observations[:8]:
        before = policy.last
        with pytest.raises(NonFiniteError), np.errstate(all="ignore"):
            policy.act(observation)
        assert policy.last is before
        policy.reset()
        policy._last = before


def test_change_from_action_to_action(mini: Path, observations: Observations) -> None:
    policy = load(mini, Guards(max_change=(0.01, 0.5)))
    stretched(policy, 100)
    actions = np.array([policy.act(observation) for observation in observations])
    steps = np.abs(np.diff(actions.astype(np.float64), axis=0))
    assert (steps <= np.array([0.01, 0.5]) + 1e-5).all()
    assert policy.guard_counts.slowed > 0
    chunk = policy.act_chunk(observations[0])
    assert (np.abs(np.diff([actions[-1], *chunk], axis=0)) <= np.array([0.01, 0.5]) + 1e-5).all()


@pytest.mark.parametrize("call", ["act", "act_chunk"])
def test_the_first_action_changes_from_where_the_robot_stands(
    mini: Path, observations: Observations, call: str
) -> None:
    step, free = np.array([0.01, 0.5]), load(mini, seed=1)
    for guards in (None, Guards(max_change=(0.01, 0.5))):
        policy = load(mini, guards, seed=1)
        # Also outside the action limits: back by a step, not at once.
        for place in (LOW, [LOW[0], HIGH[1]], LOW - 10 * (HIGH - LOW)):
            policy.reset(1, from_action=place)
            free.reset(1)
            pose = np.asarray(place, np.float32)
            got = np.atleast_2d(getattr(policy, call)(observations[0]))
            planned = np.atleast_2d(getattr(free, call)(observations[0]))
            if guards is None:
                np.testing.assert_array_equal(got, planned)
                continue
            np.testing.assert_allclose(got[0], np.clip(planned[0], pose - step, pose + step))
            assert (np.abs(np.diff([pose, *got], axis=0)) <= step * (1 + 1e-4)).all()
    policy.reset(1)
    free.reset(1)
    np.testing.assert_array_equal(policy.act(observations[0]), free.act(observations[0]))


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), [[1, 2]], (1, np.nan), (1, 1e39), "ab", {}])
def test_a_place_that_cannot_be_is_refused_and_nothing_forgotten(
    mini: Path, observations: Observations, value: Any
) -> None:
    policy, plain = load(mini), load(mini)
    for observation in observations[:3]:
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
        with pytest.raises(UsageError, match=r"expected from_action of 2 finite numbers"):
            policy.reset(7, from_action=value)


def test_a_returned_action_is_the_callers(mini: Path, observations: Observations) -> None:
    policy, plain = load(mini), load(mini)
    for observation in observations[:12]:
        action = policy.act(observation)
        np.testing.assert_array_equal(action, plain.act(observation))
        action[:] = 1e9


def test_a_wrong_guard_is_told_at_loading(mini: Path) -> None:
    with pytest.raises(UsageError, match="expected action_limits of one number or 2"):
        load(mini, Guards(action_limits=((0, 0, 0), (1, 1, 1))))


def test_stale_observations_leave_the_history_alone(mini: Path, observations: Observations) -> None:
    policy, plain = load(mini), load(mini)
    for observation in observations[:20]:
        now = time.monotonic()
        for stamp in (now - 0.6, now + 10, now - 1e9):
            with pytest.raises(StaleObservationError):
                policy.act(observations[-1], stamp)
        got = policy.act(observation, time.monotonic())
        np.testing.assert_array_equal(got, plain.act(observation))
        with pytest.raises(StaleObservationError, match="after a newer one"):
            policy.act(observation, now)
    with pytest.raises(StaleObservationError, match="missing"):
        policy.act_chunk(observations[0])
    policy.reset()
    policy.act(observations[0])


def test_a_refused_observation_does_not_use_up_its_time(
    mini: Path, observations: Observations
) -> None:
    policy, now = load(mini), time.monotonic()
    with pytest.raises(ObservationError, match="missing"):
        policy.act({}, now)
    policy.act(observations[0], now)


class Slow:
    """Lets a policy's predictions wait."""

    def __init__(self, policy: EdgePolicy) -> None:
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None
        graphs = policy._window.graphs
        for name in ("predict", "replan"):
            setattr(graphs, name, self._waiting(getattr(graphs, name)))

    def _waiting(self, method: Any) -> Any:
        def waiting(*arguments: Any, **options: Any) -> Any:
            self.go.wait(20)
            if self.error is not None:
                raise self.error
            return method(*arguments, **options)

        return waiting

    @contextmanager
    def stuck(self) -> Iterator[None]:
        self.go.clear()
        try:
            yield
        finally:
            self.go.set()


def deadline(on_late: Any, seconds: float = 0.02) -> Guards:
    return Guards(deadline_s=seconds, on_late=on_late)


def caught_up(policy: EdgePolicy) -> None:
    """Wait for the jobs that were late."""
    assert policy._deadline is not None
    policy._deadline.finish(lambda: None)  # type: ignore[arg-type, return-value]


def test_in_time_a_deadline_changes_nothing(mini: Path, observations: Observations) -> None:
    policy, plain = load(mini, deadline("raise", 20), seed=5), load(mini, seed=5)
    for observation in observations:
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
    np.testing.assert_array_equal(
        policy.act_chunk(observations[0]), plain.act_chunk(observations[0])
    )
    assert policy.guard_counts.late == 0


def test_late_and_raise(mini: Path, observations: Observations) -> None:
    policy, plain = load(mini, deadline("raise"), seed=5), load(mini, seed=5)
    slow = Slow(policy)
    with slow.stuck(), pytest.raises(DeadlineError, match=r"no action within 0\.02 s"):
        policy.act(observations[0])
    plain.act(observations[0])
    caught_up(policy)
    # The observation was not lost, and the chunk goes on where it would be.
    policy._deadline._seconds = 20  # type: ignore[union-attr]
    for observation in observations[1:20]:
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
    assert policy.guard_counts.late == 1


def test_late_and_hold(mini: Path, observations: Observations) -> None:
    guards = deadline("hold", 0.05)
    policy, plain = load(mini, guards, seed=5, replan_every=1), load(mini, seed=5, replan_every=1)
    slow = Slow(policy)
    with slow.stuck(), pytest.raises(DeadlineError):
        policy.act(observations[0])  # nothing to hold yet
    plain.act(observations[0])
    caught_up(policy)
    policy._deadline._seconds = 20  # type: ignore[union-attr]
    held = policy.act(observations[1])
    np.testing.assert_array_equal(held, plain.act(observations[1]))
    policy._deadline._seconds = 0.05  # type: ignore[union-attr]
    kept = held.copy()
    held[:] = 1e9  # the caller's array is not what is held
    with slow.stuck():
        for observation in observations[2:5]:
            np.testing.assert_array_equal(policy.act(observation), kept)
            plain.act(observation)
    caught_up(policy)
    policy._deadline._seconds = 20  # type: ignore[union-attr]
    for observation in observations[5:12]:
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
    assert policy.guard_counts.late == 4


def test_late_and_continue(mini: Path, observations: Observations) -> None:
    policy, chunks = load(mini, deadline("continue"), replan_every=2), load(mini)
    slow = Slow(policy)
    policy._deadline._seconds = 20  # type: ignore[union-attr]
    chunk = chunks.act_chunk(observations[0])
    got = [policy.act(observation) for observation in observations[:2]]
    policy._deadline._seconds = 0.05  # type: ignore[union-attr]
    with slow.stuck():
        got += [policy.act(observation) for observation in observations[2:5]]
        np.testing.assert_array_equal(got, chunk)
        with pytest.raises(DeadlineError):
            policy.act(observations[5])


def test_a_backend_that_stays_away_has_failed(mini: Path, observations: Observations) -> None:
    policy = load(mini, deadline("hold", 0.5))
    size = policy.manifest.policy.action_chunk_size
    slow = Slow(policy)
    for observation in observations[:size]:
        policy.act(observation)
    policy._deadline._seconds = 0.01  # type: ignore[union-attr]
    with slow.stuck():
        for observation in observations[size : 2 * size]:
            policy.act(observation)
        for _ in range(3):
            with pytest.raises(DeadlineError, match=r"did not answer for 5 calls.*reset\(\)"):
                policy.act(observations[0])
        with pytest.raises(DeadlineError, match="still works on an earlier call"):
            policy.reset()
    caught_up(policy)
    with pytest.raises(DeadlineError, match=r"reset\(\)"):
        policy.act(observations[0])
    policy.reset(seed=0)
    policy._deadline._seconds = 20  # type: ignore[union-attr]
    plain = load(mini)
    for observation in observations[:12]:
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))


def test_a_late_failure_is_not_lost(mini: Path, observations: Observations) -> None:
    policy = load(mini, deadline("raise"))
    slow = Slow(policy)
    slow.error = BackendError("the accelerator fell off")
    with slow.stuck(), pytest.raises(DeadlineError):
        policy.act(observations[0])
    while not policy._deadline._late._jobs[0].done():  # type: ignore[union-attr]
        time.sleep(0.001)
    with pytest.raises(BackendError, match="fell off"):
        policy.act(observations[1])
    with pytest.raises(HistoryError, match=r"reset\(\)"):
        policy.act(observations[2])


def test_use_after_fork_is_told(mini: Path, observations: Observations) -> None:
    policy = load(mini)
    policy.act(observations[0])
    for _ in range(cases(10, 200)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            texts = []
            for call in (lambda: policy.act(observations[1]), policy.reset):
                try:
                    call()
                except ForkError as error:  # noqa: PERF203 - two calls
                    texts.append(str(error))
            os.write(writing, "\n".join(texts).encode())
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as file:  # noqa: PTH123 - opened by descriptor
            told = file.read().decode().splitlines()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(told) == 2
        assert all("load the policy in the new process" in text for text in told)
    policy.act(observations[1])


FORKED = """
import gc, os, sys
from vqbet_edge import EdgePolicy
policy = EdgePolicy.load(sys.argv[1], "onnxruntime")
circle = [EdgePolicy.load(sys.argv[1], "onnxruntime").sibling()]
circle.append(circle)
del circle
child = os.fork()
if child == 0:
    del policy
    gc.collect()
    os._exit(7)  # as multiprocessing ends its children; ONNX Runtime's own exit handler waits too
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_forked_process_frees_nothing_and_ends(mini: Path) -> None:
    """ONNX Runtime's sessions wait for their threads when they are freed."""
    command = [sys.executable, "-c", FORKED, mini]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("guards", [None, Guards(deadline_s=20, on_late="raise")])
def test_eight_siblings_act_as_alone(
    mini: Path, observations: Observations, guards: Guards | None
) -> None:
    """Bitwise, all at once on the same weights, each in a thread of its own."""
    steps = cases(40, 1000)

    def acted(policy: EdgePolicy, seed: int) -> list[np.ndarray]:
        return [policy.act(observations[(step + 7 * seed) % 60]) for step in range(steps)]

    alone = [acted(load(mini, seed=seed, temperature=1.0), seed) for seed in range(8)]
    first = load(mini, guards, seed=99, temperature=1.0)
    siblings = [first.sibling(seed=seed) for seed in range(8)]
    found: dict[int, list[np.ndarray]] = {}

    def work(seed: int) -> None:
        found[seed] = acted(siblings[seed], seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        np.testing.assert_array_equal(found[seed], alone[seed])


def test_a_sibling_has_a_life_of_its_own(mini: Path, observations: Observations) -> None:
    policy, plain = load(mini, seed=1), load(mini, seed=1)
    sibling = policy.sibling(seed=2)
    for step, observation in enumerate(observations[:20]):
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
        if step % 3 == 0:
            sibling.act(observations[-1 - step])
        if step == 11:
            sibling.reset()
        if step == 12:
            with pytest.raises(ObservationError):
                sibling.act({})
    assert sibling.last is not policy.last
    before = sibling.guard_counts
    del policy
    gc.collect()
    sibling.act(observations[0])
    assert sibling.guard_counts == before


def test_a_sibling_has_the_same_options(mini: Path, observations: Observations) -> None:
    options: dict[str, Any] = {"temperature": 0, "replan_every": 2, "prefetch": "off"}
    limits = Guards(action_limits=((-0.5, 20.0), (0.25, 30.0)))
    sibling = load(mini, limits, seed=3, **options).sibling()
    plain = load(mini, limits, seed=0, **options)
    stretched(sibling, 300)
    stretched(plain, 300)
    for observation in observations[:10]:
        np.testing.assert_array_equal(sibling.act(observation), plain.act(observation))
    assert sibling.guard_counts == plain.guard_counts
    assert sibling.guard_counts.clamped > 0
    with pytest.raises(UsageError, match="expected a seed of 0 or more"):
        plain.sibling(seed=-1)


def test_a_closed_policy_says_so_and_its_siblings_act(
    mini: Path, observations: Observations
) -> None:
    with load(mini, seed=1) as policy:
        policy.act(observations[0])
        sibling = policy.sibling(seed=1)
    for call in (lambda: policy.act(observations[1]), policy.reset, policy.sibling):
        with pytest.raises(BackendError, match="closed; load the policy again"):
            call()
    plain = load(mini, seed=1)
    for observation in observations[:8]:
        np.testing.assert_array_equal(sibling.act(observation), plain.act(observation))
    sibling.close()
    sibling.close()


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_policy_is_not_copied(mini: Path, copying: Any) -> None:
    with pytest.raises(UsageError, match=r"EdgePolicy.load there, or sibling\(\)"):
        copying(load(mini))


def test_overlapping_calls_raise_or_are_right(mini: Path, observations: Observations) -> None:
    policy, plain = load(mini, temperature=0), load(mini, temperature=0)
    observation = observations[0]
    # One observation over and over: whoever gets through, the n-th call has one right answer.
    calls = cases(60, 2000)
    expected = {plain.act(observation).tobytes() for _ in range(calls * 8)}
    answers: list[bytes] = []
    refused = []

    def work() -> None:
        for _ in range(calls):
            try:
                answers.append(policy.act(observation).tobytes())
            except ConcurrentUseError:  # noqa: PERF203 - is what we count
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) + len(refused) == calls * 8
    assert answers
    assert set(answers) <= expected
