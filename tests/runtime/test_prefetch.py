"""Work done while the robot moves: the same actions, sooner."""

import gc
import threading
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import oracle
import pytest
from workshop import Exported

from vqbet_edge import BackendError, EdgePolicy, HistoryError
from vqbet_edge.runtime.backends.base import Prefetch

MODES: tuple[Prefetch, ...] = ("thread", "inline", "off")


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
def test_actions_are_the_same_to_rounding(
    tiny: Exported, observations: Any, replan_every: int
) -> None:
    policies = [load(tiny, mode, replan_every=replan_every) for mode in MODES]
    for observation in observations:
        threaded, inline, plain = (policy.act(observation) for policy in policies)
        np.testing.assert_allclose(threaded, plain, rtol=2e-6)
        np.testing.assert_allclose(inline, plain, rtol=2e-6)
        assert len({tuple(policy.last.codes) for policy in policies if policy.last}) == 1


@pytest.mark.extended
def test_a_window_of_one_observation(tmp_path: Path) -> None:
    path = miniature.write(tmp_path / "one.bundle", n_obs_steps=1)
    policies = [EdgePolicy.load(path, "onnxruntime", prefetch=mode) for mode in MODES]
    random = np.random.default_rng(0)
    for _ in range(12):
        observation = miniature.observation(random)
        threaded, inline, plain = (policy.act(observation) for policy in policies)
        np.testing.assert_allclose(threaded, plain, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(inline, plain, rtol=1e-5, atol=1e-5)


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


# A job that ends its thread, or is said to, would leave the next prediction waiting.
@pytest.mark.parametrize("kind", [BackendError, SystemExit, KeyboardInterrupt])
def test_failed_prefetching_is_raised_and_asks_for_a_reset(
    tiny: Exported, observations: Any, kind: type[BaseException]
) -> None:
    policy, plain = load(tiny, "thread"), load(tiny, "off")
    policy.act(observations[0])
    encode = policy._window.graphs.encode

    def failing(*_: Any) -> None:
        raise kind("the accelerator fell off")

    policy._window.graphs.encode = failing  # type: ignore[method-assign]
    policy.act(observations[1])
    assert not policy._prefetching.running(60)
    with pytest.raises(kind, match="fell off"):
        policy.act(observations[2])
    policy._window.graphs.encode = encode  # type: ignore[method-assign]
    with pytest.raises(HistoryError, match=r"call reset\(\)"):
        policy.act(observations[7])
    policy.reset(seed=5)
    plain.reset(seed=5)
    for observation in observations[8:16]:
        np.testing.assert_allclose(policy.act(observation), plain.act(observation), rtol=2e-6)


def test_the_thread_ends_with_the_policy(tiny: Exported, observations: Any) -> None:
    before = set(threading.enumerate())
    policy = load(tiny, "thread")
    for observation in observations[:3]:
        policy.act(observation)
    (thread,) = (t for t in set(threading.enumerate()) - before if t.name == "vqbet-prefetch")
    del policy
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
