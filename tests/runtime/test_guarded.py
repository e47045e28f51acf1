"""`EdgePolicy` with its guards."""

import copy
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
from torture import cases, counts

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


@pytest.mark.parametrize("count", counts(100, 500, 100_000))
def test_no_action_escapes_adversarial_observations(mini: Path, count: int) -> None:
    limits = ((-0.5, 20.0), (0.25, 30.0))
    policy, random = (
        load(mini, Guards(action_limits=limits), replan_every=1),
        np.random.default_rng(9),
    )
    stretched(policy, 300)
    acted = 0
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
@pytest.mark.parametrize(("value", "temperature"), [(np.nan, 0), (np.inf, 1.0), (-np.inf, 0)])
def test_not_a_number_is_always_raised(
    mini: Path, observations: Observations, where: str, value: float, temperature: float
) -> None:
    policy = load(mini, temperature=temperature, replan_every=1)
    policy.act(observations[0])
    graphs, random = policy._window.graphs, np.random.default_rng(0)
    replan = graphs.replan

    def spoiled(*arguments: Any, **options: Any) -> Any:
        outputs = replan(*arguments, **options)
        array = getattr(outputs, where)
        array.flat[random.integers(array.size)] = value
        return outputs

    if where == "table":
        assert policy._planner._table is not None
        policy._planner._table = np.full_like(policy._planner._table, value)
    else:
        graphs.replan = spoiled  # type: ignore[method-assign]
    before = policy.last
    with pytest.raises(NonFiniteError), np.errstate(all="ignore"):
        policy.act(observations[1])
    assert policy.last is before


@pytest.mark.parametrize("value", [(1, 2, 3), [[1, 2]], (1, np.nan), (1, 1e39), "ab"])
def test_a_place_that_cannot_be_is_refused_and_nothing_forgotten(
    mini: Path, observations: Observations, value: Any
) -> None:
    policy, plain = load(mini), load(mini)
    for observation in observations[:3]:
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
        with pytest.raises(UsageError, match=r"expected from_action of 2 finite numbers"):
            policy.reset(7, from_action=value)


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
    for _ in range(cases(3, 200)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            for call in (lambda: policy.act(observations[1]), policy.reset):
                try:
                    call()
                except ForkError as error:  # noqa: PERF203 - two calls
                    os.write(writing, f"{error}\n".encode())
            os._exit(0)
        os.close(writing)
        with open(reading) as file:  # noqa: PTH123 - opened by descriptor
            told = file.read().splitlines()
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
    steps = cases(20, 1000)

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


def test_a_sibling_has_the_same_options(mini: Path, observations: Observations) -> None:
    options: dict[str, Any] = {"temperature": 0, "replan_every": 2, "prefetch": "off"}
    limits = Guards(action_limits=((-0.5, 20.0), (0.25, 30.0)))
    sibling = load(mini, limits, seed=3, **options).sibling()
    plain = load(mini, limits, seed=0, **options)
    for each in (sibling, plain):
        stretched(each, 300)
    for observation in observations[:10]:
        np.testing.assert_array_equal(sibling.act(observation), plain.act(observation))
    assert sibling.guard_counts == plain.guard_counts
    assert sibling.guard_counts.clamped > 0


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


@pytest.mark.parametrize("copying", [pickle.dumps, copy.deepcopy])
def test_a_policy_is_not_copied(mini: Path, copying: Any) -> None:
    with pytest.raises(UsageError, match=r"EdgePolicy.load there, or sibling\(\)"):
        copying(load(mini))


@pytest.mark.extended
def test_overlapping_calls_raise_or_are_right(mini: Path, observations: Observations) -> None:
    policy, plain = load(mini, temperature=0), load(mini, temperature=0)
    # One observation over and over: whoever gets through, the n-th call has one right answer.
    calls = cases(60, 2000)
    expected = {plain.act(observations[0]).tobytes() for _ in range(calls * 8)}
    answers: list[bytes | None] = []

    def work() -> None:
        for _ in range(calls):
            try:
                answers.append(policy.act(observations[0]).tobytes())
            except ConcurrentUseError:  # noqa: PERF203 - is what we count
                answers.append(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == calls * 8
    assert set(answers) - {None} <= expected
    assert any(answers)
