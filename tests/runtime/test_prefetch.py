"""Work done while the robot moves: the same actions, sooner."""

import gc
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import oracle
import pytest
from workshop import Exported, Workshop

from vqbet_edge import BackendError, EdgePolicy, HistoryError, UsageError

MODES = ("thread", "inline", "off")


def load(exported: Exported, prefetch: Any, **options: Any) -> EdgePolicy:
    return EdgePolicy.load(
        exported.bundle, backend="onnxruntime", prefetch=prefetch, seed=3, **options
    )


@pytest.fixture
def observations(tiny: Exported) -> list[dict[str, np.ndarray]]:
    return oracle.observations(tiny.case, 24)


def prefilled(policy: EdgePolicy) -> list[bool]:
    """Whether each prediction from now on found its past computed."""
    found: list[bool] = []
    replan = policy._window.graphs.replan

    def spy(frames: Any, states: Any, *, prefilled: bool) -> Any:
        found.append(prefilled)
        return replan(frames, states, prefilled=prefilled)

    policy._window.graphs.replan = spy  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("replan_every", [1, 2, 5])
@pytest.mark.parametrize("prefetch", ["thread", "inline"])
def test_actions_are_the_same_to_rounding(
    tiny: Exported, observations: Any, prefetch: str, replan_every: int
) -> None:
    plain = load(tiny, "off", replan_every=replan_every)
    policy = load(tiny, prefetch, replan_every=replan_every)
    for observation in observations:
        np.testing.assert_allclose(policy.act(observation), plain.act(observation), rtol=2e-6)
        assert policy.last is not None
        assert plain.last is not None
        np.testing.assert_array_equal(policy.last.codes, plain.last.codes)


@pytest.mark.parametrize(("cameras", "window"), [(1, 1), (2, 3)])
def test_other_shapes(workshop: Workshop, cameras: int, window: int) -> None:
    case = oracle.small(
        f"prefetch_{cameras}_{window}",
        image=(40, 48),
        crop_shape=(36, 40),
        n_obs_steps=window,
        **({"cameras": cameras} if cameras > 1 else {}),
    )
    policies = [load(workshop.bundle(case), mode) for mode in MODES]
    for observation in oracle.observations(case, 12):
        actions = [policy.act(observation) for policy in policies]
        np.testing.assert_allclose(actions[0], actions[2], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(actions[1], actions[2], rtol=1e-5, atol=1e-5)


def test_the_past_is_computed_ahead(tiny: Exported, observations: Any) -> None:
    policy = load(tiny, "thread", replan_every=3)
    found = prefilled(policy)
    for observation in observations[:10]:
        policy.act(observation)
    # The first prediction fills the window and has nothing newer to encode.
    assert found == [True, True, True]


def test_a_chunk_asked_for_out_of_turn_does_without(tiny: Exported, observations: Any) -> None:
    policy, plain = load(tiny, "thread"), load(tiny, "off")
    found = prefilled(policy)
    for step, observation in enumerate(observations[:12]):
        call = "act_chunk" if step in {2, 3, 7} else "act"
        got, expected = getattr(policy, call)(observation), getattr(plain, call)(observation)
        np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert found[0] is False


def test_calls_faster_than_the_encoder(tiny: Exported, observations: Any) -> None:
    policy, plain = load(tiny, "thread"), load(tiny, "off")
    encode = policy._window.graphs.encode

    def slow(frames: Any, row: int) -> None:
        time.sleep(0.02)
        encode(frames, row)

    policy._window.graphs.encode = slow  # type: ignore[method-assign]
    for observation in observations:
        np.testing.assert_allclose(policy.act(observation), plain.act(observation), rtol=2e-6)


def test_failed_prefetching_is_raised_and_asks_for_a_reset(
    tiny: Exported, observations: Any
) -> None:
    policy, plain = load(tiny, "thread"), load(tiny, "off")
    policy.act(observations[0])
    encode = policy._window.graphs.encode

    def failing(*_: Any) -> None:
        raise BackendError("the accelerator fell off")

    policy._window.graphs.encode = failing  # type: ignore[method-assign]
    policy.act(observations[1])
    while policy._prefetching.running():
        time.sleep(0.01)
    with pytest.raises(BackendError, match="fell off"):
        policy.act(observations[2])
    policy._window.graphs.encode = encode  # type: ignore[method-assign]
    with pytest.raises(HistoryError, match=r"call reset\(\)"):
        policy.act(observations[7])
    policy.reset(seed=5)
    plain.reset(seed=5)
    for observation in observations[8:16]:
        np.testing.assert_allclose(policy.act(observation), plain.act(observation), rtol=2e-6)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, BackendError])
def test_whatever_prefetching_raises_reaches_the_caller(
    tiny: Exported, observations: Any, kind: type[BaseException]
) -> None:
    """A job that ends its thread, or is said to, would leave the next prediction waiting."""
    policy = load(tiny, "thread")
    policy.act(observations[0])

    def failing(*_: Any) -> None:
        raise kind("the driver gave up")

    policy._window.graphs.encode = failing  # type: ignore[method-assign]
    policy.act(observations[1])
    with pytest.raises(kind, match="gave up"):
        policy.act_chunk(observations[2])
    assert policy._worker.submit(lambda: 7).result() == 7


def test_an_unknown_mode_is_refused(tiny: Exported) -> None:
    with pytest.raises(UsageError, match="expected prefetch to be one of"):
        load(tiny, "later")


def test_the_thread_ends_with_the_policy(tiny: Exported, observations: Any) -> None:
    def count() -> int:
        return sum(thread.name == "vqbet-prefetch" for thread in threading.enumerate())

    gc.collect()  # policies of other tests, which an exception may still hold
    before = count()
    policy = load(tiny, "thread")
    for observation in observations[:3]:
        policy.act(observation)
    assert count() == before + 1
    del policy
    # The last job may still hold it for a moment.
    for _ in range(1000):
        if count() == before:
            break
        time.sleep(0.01)
    assert count() == before


def test_python_ends_while_prefetching_runs(tiny: Exported) -> None:
    program = """
import sys, threading, time, numpy as np
from vqbet_edge import EdgePolicy
policy = EdgePolicy.load(sys.argv[1], "onnxruntime", prefetch="thread")
observation = {"observation.image": np.zeros((40, 48, 3), np.uint8),
               "observation.state": np.ones(2, np.float32)}
policy.act(observation)
encode, runs = policy._window.graphs.encode, threading.Event()
policy._window.graphs.encode = lambda *_: (runs.set(), time.sleep(0.2), encode(*_))
policy.act(observation)
assert runs.wait(60)
print("last line")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny.bundle)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "last line\n"
