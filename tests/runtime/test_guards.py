"""The guards by themselves: limits, clock, deadline."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vqbet_edge import DeadlineError, Guards, NonFiniteError, StaleObservationError, UsageError
from vqbet_edge.runtime.guards.clock import ObservationClock
from vqbet_edge.runtime.guards.deadline import Deadline
from vqbet_edge.runtime.guards.limits import ActionLimits, action_limits, change_limit

DATA = np.array([[0, -1], [100, 1]], np.float32)  # lowest and highest


def limits(guards: Guards, data: NDArray[np.float32] | None = DATA) -> ActionLimits:
    found = action_limits(guards, data, 2)
    assert found is not None
    return found


def test_by_default_actions_stay_near_the_training_data() -> None:
    found = limits(Guards())
    np.testing.assert_allclose(found.low, [-10, -1.2], rtol=1e-6)
    np.testing.assert_allclose(found.high, [110, 1.2], rtol=1e-6)
    found = limits(Guards(margin=0))
    np.testing.assert_array_equal(found.low, np.float32([0, -1]))
    np.testing.assert_array_equal(found.high, np.float32([100, 1]))


def test_without_the_datas_range_there_is_no_limit_but_the_users() -> None:
    assert action_limits(Guards(), None, 2) is None
    assert action_limits(Guards(action_limits=None), DATA, 2) is None
    found = limits(Guards(action_limits=((-1, -2), 3)), None)
    assert found.low.tolist() == [-1, -2]
    assert found.high.tolist() == [3, 3]


@pytest.mark.parametrize("value", [0.1, -0.1, 1 / 3, 1e-50, 16777217.0])
def test_a_limit_that_float32_cannot_hold_is_not_passed(value: float) -> None:
    found = limits(Guards(action_limits=(-abs(value), abs(value))))
    assert found.high.astype(np.float64).max() <= abs(value)
    assert found.low.astype(np.float64).min() >= -abs(value)


def test_clamps_and_says_what() -> None:
    actions = np.array([[-11, 0], [50, 2], [50, 0]], np.float32)
    outside = limits(Guards()).clamp(actions)
    assert outside.tolist() == [[True, False], [False, True], [False, False]]
    np.testing.assert_allclose(actions, [[-10, 0], [50, 1.2], [50, 0]], rtol=1e-6)


def test_nothing_escapes_the_clamp() -> None:
    found, random = limits(Guards()), np.random.default_rng(0)
    patterns = random.integers(0, 1 << 32, (100_000, 2), np.uint32).view(np.float32)
    for actions in (patterns, np.array([[np.inf, -np.inf]], np.float32)):
        finite = actions[~np.isnan(actions).any(axis=1)]
        found.clamp(finite)
        assert ((finite >= found.low) & (finite <= found.high)).all()


def test_nan_is_never_clamped_to_a_number() -> None:
    with pytest.raises(NonFiniteError, match="not a number"):
        limits(Guards()).clamp(np.array([[50, np.nan]], np.float32))


def test_change_from_step_to_step() -> None:
    limit = change_limit(Guards(max_change=(1, 10)), 2)
    assert limit is not None
    first = np.array([5, 5], np.float32)
    assert not limit.apply(first)
    assert first.tolist() == [5, 5]
    second = np.array([9, 9], np.float32)
    assert limit.apply(second)
    assert second.tolist() == [6, 9]
    third = np.array([-9, -9], np.float32)
    assert limit.apply(third)
    assert third.tolist() == [5, -1]
    limit.clear()
    assert not limit.apply(np.array([100, 100], np.float32))


WRONG: list[dict[str, Any]] = [
    {"margin": -0.1},
    {"margin": float("nan")},
    {"max_age_s": "1"},
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
    "value", ["all", (1, 0), (0, (1, 2, 3)), (np.nan, 1), ("a", "b"), ((0, 0), (1, -1)), 3, ()]
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


def test_fresh_stamps_in_order_pass(clock: ObservationClock) -> None:
    for _ in range(100):
        stamp = time.monotonic()
        clock.check(stamp)
        clock.accept(stamp)
        time.sleep(1e-6)
    clock.clear()
    clock.check(None)


@pytest.mark.parametrize(
    ("age", "message"),
    [
        (0.6, r"the observation is 0\.6\d\d s old, expected 0\.5 s at most"),
        (-0.1, r"expected observation_time in seconds of time\.monotonic\(\)"),
        (float("nan"), "expected observation_time"),
        (float("-inf"), "expected observation_time"),
    ],
)
def test_stale_and_impossible_stamps(clock: ObservationClock, age: float, message: str) -> None:
    with pytest.raises(StaleObservationError, match=message):
        clock.check(time.monotonic() - age)


@pytest.mark.parametrize("stamp", [1_795_390_034.25, 1_700_000_000_000_000_000, "now", [1.0]])
def test_other_clocks_are_noticed(clock: ObservationClock, stamp: Any) -> None:
    with pytest.raises(StaleObservationError, match=r"time\.time\(\)"):
        clock.check(stamp)


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


def action(value: float) -> Any:
    return np.full(2, value, np.float32)


def test_a_job_in_time_gives_its_result() -> None:
    deadline = Deadline(5, 3)
    got = deadline.run(lambda: action(1), time.monotonic())
    assert got is not None
    assert got.tolist() == [1, 1]


def test_late_jobs_run_on_in_order() -> None:
    deadline, go, done = Deadline(0.01, 3), threading.Event(), []

    def job(number: int) -> Any:
        go.wait(10)
        done.append(number)
        return action(number)

    for number in range(3):
        deadline.admit()
        assert deadline.run(lambda number=number: job(number), time.monotonic()) is None
    with pytest.raises(DeadlineError, match="did not answer for 3 calls"):
        deadline.admit()
    assert deadline.busy
    go.set()
    assert deadline.finish(lambda: job(3)).tolist() == [3, 3]
    assert not deadline.busy
    with pytest.raises(DeadlineError, match=r"call reset\(\)"):
        deadline.admit()
    deadline.forget()
    deadline.admit()
    assert done == [0, 1, 2, 3]


def test_what_a_late_job_fails_with_is_raised_by_the_next() -> None:
    deadline, go = Deadline(0.01, 3), threading.Event()

    def failing() -> Any:
        go.wait(10)
        raise ZeroDivisionError

    assert deadline.run(failing, time.monotonic()) is None
    go.set()
    deadline.finish(lambda: action(0))
    with pytest.raises(ZeroDivisionError):
        deadline.admit()


def test_its_thread_ends_with_it() -> None:
    before = set(threading.enumerate())
    deadline = Deadline(1, 1)
    deadline.finish(lambda: action(0))
    (thread,) = set(threading.enumerate()) - before
    del deadline
    thread.join(10)
    assert not thread.is_alive()
