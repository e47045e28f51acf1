"""The guards by themselves: limits and clock."""

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vqbet_edge import Guards, NonFiniteError, StaleObservationError, UsageError
from vqbet_edge.runtime.guards.actions import ActionGuard
from vqbet_edge.runtime.guards.clock import ObservationClock
from vqbet_edge.runtime.guards.limits import ActionLimits, action_limits, change_limit

DATA = np.array([[0, -1], [100, 1]], np.float32)  # lowest and highest


def limits(guards: Guards, data: NDArray[np.float32] | None = DATA) -> ActionLimits:
    found = action_limits(guards, data, 2)
    assert found is not None
    return found


@pytest.mark.parametrize("value", [0.1, -0.1, 1 / 3, 1e-50, 16777217.0])
def test_a_limit_that_float32_cannot_hold_is_not_passed(value: float) -> None:
    found = limits(Guards(action_limits=(-abs(value), abs(value))))
    assert found.high.astype(np.float64).max() <= abs(value)
    assert found.low.astype(np.float64).min() >= -abs(value)


def test_nothing_escapes_the_clamp_and_nan_is_never_clamped() -> None:
    guard, random = ActionGuard(Guards(), DATA, 2), np.random.default_rng(0)
    patterns = random.integers(0, 1 << 32, (100_000, 2), np.uint32).view(np.float32)
    finite = np.append(patterns[~np.isnan(patterns).any(axis=1)], [[np.inf, -np.inf]], axis=0)
    free = finite.astype(np.float32)
    clamped = free.copy()
    outside = guard.clamp(clamped)
    low, high = limits(Guards())
    np.testing.assert_array_equal(clamped, np.clip(free, low, high))
    np.testing.assert_array_equal(outside, clamped != free)
    with pytest.raises(NonFiniteError, match="not a number"):
        guard.clamp(np.array([[50, np.nan]], np.float32))


WRONG: list[dict[str, Any]] = [
    {"margin": float("nan")},
    {"max_age_s": True},
    {"deadline_s": 0.1},
    {"on_late": "hold"},
    {"deadline_s": 0.1, "on_late": "panic"},
    {"deadline_s": float("inf"), "on_late": "hold"},
]


@pytest.mark.parametrize("options", WRONG)
def test_what_cannot_be_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"expected|belong together"):
        Guards(**options)


@pytest.mark.parametrize(
    "value", ["all", (0, (1, 2, 3)), (np.nan, 1), ("a", "b"), ((0, 0), (1, -1)), ()]
)
def test_limits_that_do_not_fit_are_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="expected action_limits"):
        action_limits(Guards(action_limits=value), DATA, 2)


@pytest.mark.parametrize("value", [-1, (1, 2, 3), np.nan, "fast"])
def test_changes_that_do_not_fit_are_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="expected max_change"):
        change_limit(Guards(max_change=value), 2)


@pytest.fixture
def clock() -> ObservationClock:
    return ObservationClock(0.5)


@pytest.mark.parametrize(
    ("age", "message"),
    [
        (0.6, r"the observation is 0\.6\d\d s old, expected 0\.5 s at most"),
        (-0.1, r"expected observation_time in seconds of time\.monotonic\(\)"),
        (float("nan"), "expected observation_time"),
        (-1_795_390_034.25, r"time\.time\(\)"),
    ],
)
def test_stale_and_impossible_stamps(clock: ObservationClock, age: float, message: str) -> None:
    with pytest.raises(StaleObservationError, match=message):
        clock.check(time.monotonic() - age)


def test_repeated_reordered_and_missing_stamps(clock: ObservationClock) -> None:
    now = time.monotonic()
    clock.check(now)
    clock.accept(now)
    with pytest.raises(StaleObservationError, match="came again, expected one after"):
        clock.check(now)
    with pytest.raises(StaleObservationError, match="came after a newer one"):
        clock.check(now - 0.01)
    with pytest.raises(StaleObservationError, match="observation_time is missing"):
        clock.check(None)


def test_the_wall_clock_does_not_matter(
    clock: ObservationClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    for hours in (0, -1, 1):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
        stamp = time.monotonic()
        clock.check(stamp)
        clock.accept(stamp)
    clock.clear()
    clock.check(None)
