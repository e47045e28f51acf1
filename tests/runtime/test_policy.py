"""`EdgePolicy`: history, queue, frame cache, forced codes, guards."""

import threading
from typing import Any

import numpy as np
import oracle
import pytest
from workshop import Exported, Workshop

from vqbet_edge import (
    BackendError,
    ConcurrentUseError,
    EdgePolicy,
    Guards,
    HistoryError,
    NonFiniteError,
    ObservationError,
    UsageError,
)
from vqbet_edge.runtime.backends.base import Window

STATE, IMAGE = "observation.state", "observation.image"


class Counting:
    """Wraps a policy's graphs and counts what they are asked to do."""

    def __init__(self, policy: EdgePolicy) -> None:
        self.graphs: Window = policy._window.graphs
        self.encoded: list[int] = []
        encode = self.graphs.encode

        def counted(frames: Any, row: int) -> None:
            self.encoded.append(row)
            encode(frames, row)

        self.graphs.encode = counted  # type: ignore[method-assign]


def load(exported: Exported, **options: Any) -> EdgePolicy:
    return EdgePolicy.load(exported.bundle, backend="onnxruntime", **options)


@pytest.fixture
def observations(tiny: Exported) -> list[dict[str, np.ndarray]]:
    return oracle.observations(tiny.case, 24)


def test_every_frame_is_encoded_once(tiny: Exported, observations: Any) -> None:
    policy = load(tiny, prefetch="inline")
    counting = Counting(policy)
    for observation in observations:
        policy.act(observation)
    assert len(counting.encoded) == len(observations)


def test_frames_that_no_prediction_will_see_are_not_encoded(workshop: Workshop) -> None:
    case = oracle.small(
        "short_window", image=(40, 48), crop_shape=(36, 40), n_obs_steps=2, action_chunk_size=6
    )
    exported = workshop.bundle(case)
    policy, plain = (load(exported, temperature=0, prefetch="inline") for _ in range(2))
    counting = Counting(policy)
    # Three predictions: on steps 0, 6 and 12.
    for observation in oracle.observations(case, 13):
        action = policy.act(observation)
        # The reference encodes every frame at once.
        expected = plain.act(observation)
        plain._window.encode_newest()
        np.testing.assert_array_equal(action, expected)
    # The first frame fills the window; then two frames per chunk of six are seen.
    assert len(counting.encoded) == 1 + 2 * 2


def test_skipped_frames_are_encoded_when_a_chunk_is_asked_for(workshop: Workshop) -> None:
    case = oracle.small(
        "short_window", image=(40, 48), crop_shape=(36, 40), n_obs_steps=2, action_chunk_size=6
    )
    policy, plain = (load(workshop.bundle(case), temperature=0) for _ in range(2))
    seen = oracle.observations(case, 4)
    for observation in seen[:3]:
        policy.act(observation)
    for observation in seen[:3]:
        plain.act_chunk(observation)
    np.testing.assert_array_equal(policy.act_chunk(seen[3]), plain.act_chunk(seen[3]))


def test_replanning_on_every_step_is_act_chunk_of_every_step(
    tiny: Exported, observations: Any
) -> None:
    policy, chunks = load(tiny, replan_every=1), load(tiny)
    for observation in observations[:8]:
        np.testing.assert_array_equal(policy.act(observation), chunks.act_chunk(observation)[0])


def test_queue_holds_as_many_actions_as_asked(tiny: Exported, observations: Any) -> None:
    policy = load(tiny, replan_every=2, temperature=0)
    decisions = []
    for observation in observations[:6]:
        policy.act(observation)
        decisions.append(policy.last)
    assert decisions[0] is decisions[1]
    assert decisions[1] is not decisions[2]
    assert decisions[4] is decisions[5]


def test_act_chunk_drops_queued_actions(tiny: Exported, observations: Any) -> None:
    policy = load(tiny)
    policy.act(observations[0])
    policy.act_chunk(observations[1])
    before = policy.last
    policy.act(observations[2])
    assert policy.last is not before


@pytest.mark.parametrize("guards", [None, Guards(deadline_s=20, on_late="raise")])
@pytest.mark.parametrize("prefetch", ["off", "inline", "thread"])
def test_a_dropped_queue_leaves_the_history(
    tiny: Exported, observations: Any, prefetch: Any, guards: Any
) -> None:
    """The next call predicts, with what was seen before, as `act_chunk` would have."""
    policy, other = (load(tiny, prefetch=prefetch, guards=guards) for _ in range(2))
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


def test_forced_codes_are_the_decision(tiny: Exported, observations: Any) -> None:
    policy = load(tiny)
    chunk = policy.act_chunk(observations[0], codes=(3, 11))
    assert policy.last is not None
    assert policy.last.codes.tolist() == [3, 11]
    normalized = policy.last.decoded_chunk + policy.last.offset_chunk
    stats = oracle.make_statistics(tiny.case)["action"]
    low, high = stats["min"].numpy(), stats["max"].numpy()
    np.testing.assert_allclose(chunk, (normalized + 1) / 2 * (high - low) + low, rtol=1e-5)


@pytest.mark.parametrize(
    "codes", [((0, 1), (2,)), "ab", (0, 16), (-1, 0), (0,), (0, 1, 2), (0.5, 1), ((0, 1), (2, 3))]
)
def test_codes_outside_the_code_book_are_refused(
    tiny: Exported, observations: Any, codes: Any
) -> None:
    policy = load(tiny)
    with pytest.raises(UsageError, match=r"expected codes \(primary, secondary\) in 0..15"):
        policy.act_chunk(observations[0], codes=codes)
    assert policy.last is None


@pytest.mark.parametrize("replan_every", [0, 6, -1, 2.5, "2"])
def test_impossible_replanning_is_refused(tiny: Exported, replan_every: Any) -> None:
    with pytest.raises(UsageError, match=r"expected replan_every in 1\.\.5"):
        load(tiny, replan_every=replan_every)


def test_reset_forgets_the_episode(tiny: Exported, observations: Any) -> None:
    policy = load(tiny, seed=4)
    first = [policy.act(observation) for observation in observations[:7]]
    policy.reset(seed=4)
    assert policy.last is None
    again = [policy.act(observation) for observation in observations[:7]]
    np.testing.assert_array_equal(first, again)


def test_actions_are_fresh_arrays(tiny: Exported, observations: Any) -> None:
    policy = load(tiny, temperature=0)
    kept = [policy.act(observation) for observation in observations[:6]]
    copies = [action.copy() for action in kept]
    for observation in observations[6:12]:
        policy.act(observation)
    np.testing.assert_array_equal(kept, copies)


def test_large_code_books_are_decoded_by_their_graph(
    workshop: Workshop, tiny: Exported, observations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqbet_export import assembly

    monkeypatch.setattr(assembly, "MAX_TABLE_BYTES", 0)
    case = oracle.small("untabulated", image=(40, 48), crop_shape=(36, 40))
    graph, table = load(workshop.bundle(case)), load(tiny)
    assert graph._planner._table is None
    assert table._planner._table is not None
    for observation in observations[:3]:
        np.testing.assert_allclose(
            graph.act_chunk(observation, codes=(2, 9)),
            table.act_chunk(observation, codes=(2, 9)),
            rtol=1e-5,
        )


@pytest.mark.parametrize("stage", ["logits", "offsets"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_outputs_raise(
    tiny: Exported, observations: Any, stage: str, value: float
) -> None:
    policy = load(tiny)
    predict = policy._window.graphs.predict

    def spoiled(states: Any) -> Any:
        outputs = predict(states)
        getattr(outputs, stage).flat[-1] = value
        return outputs

    policy._window.graphs.predict = spoiled  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError):
        policy.act(observations[0])


def test_non_finite_actions_raise_even_from_finite_parts(tiny: Exported, observations: Any) -> None:
    policy = load(tiny)
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
    tiny: Exported, observations: Any, method: str
) -> None:
    policy, plain = load(tiny, seed=2), load(tiny, seed=2)
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


@pytest.mark.parametrize("seed", [-1, 1.5, None, "x"])
def test_impossible_seeds_are_refused(tiny: Exported, seed: Any) -> None:
    with pytest.raises(UsageError, match="expected a seed of 0 or more"):
        load(tiny, seed=seed)


def test_reset_with_an_impossible_seed_changes_nothing(tiny: Exported, observations: Any) -> None:
    policy, plain = load(tiny), load(tiny)
    for observation in observations[:4]:
        policy.act(observation)
        plain.act(observation)
    with pytest.raises(UsageError, match="expected a seed of 0 or more, got -1"):
        policy.reset(seed=-1)
    np.testing.assert_array_equal(policy.act(observations[4]), plain.act(observations[4]))


def test_overlapping_calls_raise(tiny: Exported, observations: Any) -> None:
    policy = load(tiny)
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


def test_refused_observation_leaves_history_queue_and_randomness_alone(
    tiny: Exported, observations: Any
) -> None:
    policy, plain = load(tiny, temperature=1.0), load(tiny, temperature=1.0)
    for step, observation in enumerate(observations[:12]):
        bad = {**observation, STATE: np.array([np.nan, 0], np.float32)}
        if step % 3 == 0:
            with pytest.raises(ObservationError):
                policy.act(bad)
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation))
