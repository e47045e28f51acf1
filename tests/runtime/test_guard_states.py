"""States far from what was demonstrated, and what loading says of action limits."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from miniature import HIGH, LOW, STATE
from numpy.typing import NDArray

from vqbet_edge import EdgePolicy, Guards, ObservationError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.guards.actions import ActionGuard
from vqbet_edge.runtime.guards.states import StateGuard
from vqbet_edge.runtime.manifest import ACTION_RANGE, STATE_RANGE

Floats = NDArray[np.float32]

FORMAT2 = Path(__file__).parents[1] / "data" / "format2" / "bundle"
# A joint in radians, a gripper that never moved, one that never left 0.
DATA = np.float32([[-1.5, 0.04, 0], [1.5, 0.04, 0]])


def far(state: Any, guards: Guards = Guards(), data: Floats | None = DATA) -> bool:  # noqa: B008
    guard = StateGuard(guards, data, STATE, 3)
    guard.check(np.asarray(state, np.float64))
    guard.check(np.float32(state)[None])
    assert guard.far in {0, 2}
    return guard.far == 2


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ((0, 0.04, 0), False),
        ((4.4, 0.04, 0), False),  # its range is 3 wide
        ((-4.4, 0.04, 0), False),
        ((4.6, 0.04, 0), True),
        ((-4.6, 0.04, 0), True),
        ((0, 0.040001, 1e-6), False),  # rounding
        ((0, 0.041, 0), True),
        ((0, 0.04, 0.01), True),
        ((0, 0.04, -0.01), True),
    ],
)
def test_which_states_are_far(state: Any, expected: bool) -> None:
    assert far(state) is expected
    if expected:
        with pytest.raises(ObservationError, match=r"'observation.state'\[\d\]: expected .* got"):
            far(state, Guards(state_limits="data"))
    else:
        assert not far(state, Guards(state_limits="data"))
    assert not far(state, Guards(state_limits=(-np.inf, np.inf)))
    assert not far(state, data=None)


def test_a_given_range_is_taken_as_it_is() -> None:
    guards = Guards(state_limits=((-1, 0, 0), 0.1))
    assert not far((-1, 0.1, 0), guards)
    for state in ((-1.001, 0, 0), (0, 0.1001, 0)):
        with pytest.raises(ObservationError, match="allow more with"):
            far(state, guards, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("data", "does not know the range of the states"),
        ("all", "expected state_limits of 'data'"),
        ((1, 0), "expected state_limits"),
        ((0, (1, 2)), "expected state_limits of one number or 3"),
    ],
)
def test_limits_that_cannot_be_are_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StateGuard(Guards(state_limits=value), None, STATE, 3)


def test_peoples_demonstrations_are_not_far_from_one_another() -> None:
    """And their positions in another unit are."""
    from vqbet_edge.training.dataset import LeRobotDataset

    dataset = LeRobotDataset.open(Path(__file__).parents[1] / "data" / "pusht")
    states, episodes = dataset.column(STATE), dataset.column("episode_index").reshape(-1)
    for episode in np.unique(episodes):
        others = states[episodes != episode]
        guard = StateGuard(Guards(), np.stack([others.min(0), others.max(0)]), STATE, 2)
        for state in states[episodes == episode]:
            guard.check(state)
        assert guard.far == 0
        for state in states[episodes == episode]:
            guard.check(np.rad2deg(state))
        assert guard.far == (episodes == episode).sum()


def observation(random: np.random.Generator, state: Any = None) -> dict[str, np.ndarray]:
    made = miniature.observation(random)
    return made if state is None else made | {STATE: np.float32(state)}


def test_an_episodes_first_far_state_is_told_and_all_are_counted(
    mini: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, plain = (
        EdgePolicy.load(mini, "onnxruntime", guards=guards)
        for guards in (None, Guards(state_limits=(-np.inf, np.inf)))
    )
    caplog.clear()
    strange = HIGH + 1.1 * (HIGH - LOW)
    for episode in range(2):
        random = np.random.default_rng(episode)
        for step in range(6):
            seen = observation(random, strange if step in {2, 3, 4} else None)
            np.testing.assert_array_equal(policy.act(seen), plain.act(seen))
        policy.reset()
        plain.reset()
        told = [r.getMessage() for r in caplog.records if "far from what" in r.getMessage()]
        assert len(told) == episode + 1
        assert "'observation.state'[0]: expected -2 to 2, got 6.4" in told[0]
    assert policy.guard_counts == (policy.guard_counts.clamped, 0, 0, 6)
    assert plain.guard_counts.far_states == 0


def test_a_refused_state_leaves_the_history_alone(mini: Path) -> None:
    policy, plain = (EdgePolicy.load(mini, guards=g) for g in (Guards(state_limits="data"), None))
    random = np.random.default_rng(0)
    for step in range(8):
        for act in (policy.act, policy.act_chunk):
            with pytest.raises(ObservationError, match=r"expected 10 to 50, got 1000"):
                act(observation(np.random.default_rng(9), (0, 1000)))
        seen = observation(random)
        np.testing.assert_array_equal(policy.act(seen), plain.act(seen))
        assert policy.guard_counts.far_states == 2 * (step + 1)


def without(bundle: Bundle, *names: str) -> Bundle:
    return replace(bundle, arrays={k: v for k, v in bundle.arrays.items() if k not in names})


def test_limits_hold_what_was_demonstrated_whatever_scales_it() -> None:
    """Quantiles leave out what a gripper does in one step of a hundred."""
    from vqbet_edge.training.config import NormalizationMode
    from vqbet_edge.training.layouts import Normalization
    from vqbet_edge.training.normalization import EPSILON

    random, checkpoint = np.random.default_rng(0), miniature.checkpoint()
    actions = np.stack([random.normal(0, 1, 1000), np.arange(1000) % 100 == 0], 1)
    actions = actions.astype(np.float32)
    quantiles = {f"q{q:02}": np.quantile(actions, q / 100, 0) for q in (1, 10, 90, 99)}
    ends = {"min": actions.min(0), "max": actions.max(0)}
    stats = {"mean": actions.mean(0), "std": actions.std(0), **quantiles}
    for mode in NormalizationMode:
        for known in (ends, {}):
            how = Normalization(mode, stats | known, EPSILON)
            made = replace(checkpoint, normalization={"action": how})
            guard = ActionGuard(Guards(margin=0), made.action_range, 2)
            assert (guard.limits is None) is (not known)
            assert not guard.clamp(actions.copy()).any()


MARGIN = 0.1 * (HIGH - LOW)
KNOWN = (LOW - MARGIN, HIGH + MARGIN)


@pytest.mark.parametrize(
    ("which", "asked", "limits", "told"),
    [
        ("exact", "data", KNOWN, None),
        ("unknown", "data", None, r"no action is clamped; pass Guards\(action_limits=\(lowest"),
        ("unknown", None, None, None),
        ("unknown", (0, 1), ([0, 0], [1, 1]), None),
        ("old", "data", KNOWN, "may be that of quantiles"),
        ("old", None, None, None),
        ("old", (0, 1), ([0, 0], [1, 1]), None),
    ],
)
def test_loading_says_once_which_limits_are_missing(
    mini: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any,
    which: str, asked: Any, limits: Any, told: str | None,
) -> None:  # fmt: skip
    opened = Bundle.open(FORMAT2 if which == "old" else mini)
    if which == "unknown":
        opened = without(opened, ACTION_RANGE, STATE_RANGE)
    monkeypatch.setattr(Bundle, "open", lambda *_: opened)
    guards = Guards(action_limits=asked)
    with caplog.at_level(logging.WARNING, "vqbet_edge"):
        # Its proof acts too, without limits that anybody asked for, and says nothing; without
        # what the reference has, a bundle does not prove itself.
        policy = EdgePolicy.load(mini, "onnxruntime", guards=guards, prove=which != "unknown")
        policy.sibling().act(miniature.observation(np.random.default_rng(0)))
    messages = [each for each in caplog.messages if "range" in each or "far from" in each]
    assert len(messages) == (told is not None)
    assert told is None or re.search(told, messages[0])
    assert (policy.action_limits is None) is (limits is None)
    if limits is not None:
        np.testing.assert_allclose(policy.action_limits, limits, rtol=1e-6)
        policy.action_limits[0][:] = -1e9  # type: ignore[index] # a copy
        np.testing.assert_allclose(policy.action_limits, limits, rtol=1e-6)
    assert policy.fps is opened.manifest.fps
