"""`EdgePolicy`: history, queue, frame cache, forced codes, guards."""

import threading
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from miniature import HIGH, LOW

from vqbet_edge import (
    BackendError,
    ConcurrentUseError,
    EdgePolicy,
    Guards,
    HistoryError,
    NonFiniteError,
    UsageError,
)


def counted(policy: EdgePolicy) -> list[int]:
    """Rows that are encoded from now on."""
    graphs, rows = policy._window.graphs, list[int]()
    encode = graphs.encode

    def counting(frames: Any, row: int) -> None:
        rows.append(row)
        encode(frames, row)

    graphs.encode = counting  # type: ignore[method-assign]
    return rows


def load(mini: Path, **options: Any) -> EdgePolicy:
    return EdgePolicy.load(mini, backend="onnxruntime", **options)


@pytest.fixture
def observations() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [miniature.observation(random) for _ in range(24)]


def test_every_frame_is_encoded_once(mini: Path, observations: Any) -> None:
    policy = load(mini, prefetch="inline")
    encoded = counted(policy)
    for observation in observations:
        policy.act(observation)
    assert len(encoded) == len(observations)


def test_frames_that_no_prediction_will_see_are_not_encoded(tmp_path: Path) -> None:
    path = miniature.write(tmp_path / "short.bundle", n_obs_steps=2, action_chunk_size=6)
    policy, plain = (
        EdgePolicy.load(path, "onnxruntime", temperature=0, prefetch="inline") for _ in range(2)
    )
    encoded, random = counted(policy), np.random.default_rng(0)
    # Three predictions: on steps 0, 6 and 12.
    for _ in range(13):
        observation = miniature.observation(random)
        action = policy.act(observation)
        # The reference encodes every frame at once.
        expected = plain.act(observation)
        plain._window.encode_newest()
        np.testing.assert_array_equal(action, expected)
    # The first frame fills the window; then two frames per chunk of six are seen.
    assert len(encoded) == 1 + 2 * 2
    # What was skipped is encoded when a chunk is asked for.
    for _ in range(3):
        observation = miniature.observation(random)
        policy.act(observation)
        plain.act_chunk(observation)
    observation = miniature.observation(random)
    np.testing.assert_array_equal(policy.act_chunk(observation), plain.act_chunk(observation))


@pytest.mark.parametrize("guards", [None, Guards(deadline_s=20, on_late="raise")])
@pytest.mark.parametrize("prefetch", ["off", "inline", "thread"])
def test_a_dropped_queue_leaves_the_history(
    mini: Path, observations: Any, prefetch: Any, guards: Any
) -> None:
    """The next call predicts, with what was seen before, as `act_chunk` would have."""
    policy, other = (load(mini, prefetch=prefetch, guards=guards) for _ in range(2))
    policy.drop_queue()
    for each in (policy, other):
        for observation in observations[:3]:
            each.act(observation)
    assert len(policy.upcoming) > 1
    policy.drop_queue()
    assert len(policy.upcoming) == 1
    chunk = other.act_chunk(observations[3])
    for observation, expected in zip(observations[3:], chunk, strict=False):
        np.testing.assert_array_equal(policy.act(observation), expected)
    np.testing.assert_array_equal(policy.last.codes, other.last.codes)


def test_forced_codes_are_the_decision(mini: Path, observations: Any) -> None:
    policy = load(mini)
    chunk = policy.act_chunk(observations[0], codes=(3, 5))
    assert policy.last is not None
    assert policy.last.codes.tolist() == [3, 5]
    normalized = policy.last.decoded_chunk + policy.last.offset_chunk
    np.testing.assert_allclose(chunk, (normalized + 1) / 2 * (HIGH - LOW) + LOW, rtol=1e-5)


@pytest.mark.parametrize("codes", [((0, 1), (2,)), "ab", (0, 8), (-1, 0), (0.5, 1)])
def test_codes_outside_the_code_book_are_refused(mini: Path, observations: Any, codes: Any) -> None:
    policy = load(mini)
    with pytest.raises(UsageError, match=r"expected codes \(primary, secondary\) in 0..7"):
        policy.act_chunk(observations[0], codes=codes)
    assert policy.last is None


WRONG: list[tuple[dict[str, Any], str]] = [
    *(({"replan_every": value}, r"expected replan_every in 1\.\.5") for value in (0, 6, 2.5)),
    *(({"seed": value}, "expected a seed of 0 or more") for value in (-1, 1.5, None)),
    *(({"temperature": value}, r"expected a temperature of 0 \(greedy\) or more")
      for value in (-0.1, float("nan"), "0.5")),
    ({"prefetch": "later"}, "expected prefetch to be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "message"), WRONG)
def test_impossible_options_are_refused(mini: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(mini, **option)


def test_large_code_books_are_decoded_by_their_graph(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqbet_export import assembly

    monkeypatch.setattr(assembly, "MAX_TABLE_BYTES", 0)
    path, random = miniature.write(tmp_path / "large.bundle"), np.random.default_rng(0)
    graph, table = (EdgePolicy.load(each, "onnxruntime") for each in (path, mini))
    assert graph._planner._table is None
    assert table._planner._table is not None
    for _ in range(3):
        observation = miniature.observation(random)
        chunks = (policy.act_chunk(observation, codes=(2, 5)) for policy in (graph, table))
        np.testing.assert_allclose(*chunks, rtol=1e-5)


def test_non_finite_actions_raise_even_from_finite_parts(mini: Path, observations: Any) -> None:
    policy = load(mini)
    affine = policy._planner._scaling.affine
    object.__setattr__(affine, "multiply", np.full_like(affine.multiply, 3e38))
    predict = policy._window.graphs.predict

    def large(states: Any) -> Any:
        outputs = predict(states)
        outputs.offsets[:] = 2
        return outputs

    policy._window.graphs.predict = large  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="none is executed"), np.errstate(over="ignore"):
        policy.act(observations[0])


@pytest.mark.parametrize("method", ["advance", "encode", "predict"])
def test_a_call_that_fails_midway_asks_for_a_reset(
    mini: Path, observations: Any, method: str
) -> None:
    policy, plain = load(mini, seed=2), load(mini, seed=2)
    for observation in observations[:3]:
        policy.act(observation)
    working = getattr(policy._window.graphs, method)

    def failing(*_: Any) -> None:
        raise BackendError("the accelerator fell off")

    setattr(policy._window.graphs, method, failing)
    with pytest.raises(BackendError, match="fell off"):
        policy.act_chunk(observations[3])
    setattr(policy._window.graphs, method, working)
    for _ in range(2):
        with pytest.raises(HistoryError, match=r"call reset\(\)"):
            policy.act(observations[4])
    policy.reset(seed=2)
    for observation in observations[5:9]:
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))


def test_overlapping_calls_raise(mini: Path, observations: Any) -> None:
    policy = load(mini)
    inside, leave = threading.Event(), threading.Event()
    predict = policy._window.graphs.predict

    def slow(states: Any) -> Any:
        inside.set()
        leave.wait(10)
        return predict(states)

    policy._window.graphs.predict = slow  # type: ignore[method-assign]
    worker = threading.Thread(target=policy.act, args=(observations[0],))
    worker.start()
    inside.wait(10)
    with pytest.raises(ConcurrentUseError, match=r"one sibling\(\) per thread"):
        policy.act(observations[1])
    with pytest.raises(ConcurrentUseError):
        policy.reset()
    leave.set()
    worker.join()
    assert policy.act(observations[1]).shape == (2,)
