"""Every guard with every other, against what they promise, step by step.

The backend is late where the script says so: its job is finished, and its answer is not taken.
"""

import time
from itertools import product
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from miniature import HIGH, LOW
from numpy.typing import NDArray

from vqbet_edge import DeadlineError, EdgePolicy, Guards, StaleObservationError

Floats = NDArray[np.float32]

# The untrained policy's actions leave these limits and change by more than this.
LIMITS = ((-0.5, 20.0), (0.25, 30.0))
CHANGE = (0.01, 0.5)
# One call each; with a deadline `late` is late, and otherwise as `act`.
SCRIPT = "late act act stale late late act stale act_chunk late act act late act act_chunk late act"


@pytest.fixture(scope="module")
def loaded(mini: Path) -> EdgePolicy:
    return EdgePolicy.load(mini, "onnxruntime")


def policy(loaded: EdgePolicy, guards: Guards, replan_every: int) -> EdgePolicy:
    bundle, backend = loaded._bundle, loaded._backend
    return EdgePolicy(bundle, backend, seed=3, replan_every=replan_every, guards=guards)


class Promised:
    """What the guards promise, from what a policy without any plans."""

    def __init__(self, free: EdgePolicy, guards: Guards, before: Floats | None) -> None:
        self.free, self.guards = free, guards
        self.before, self.handed = before, None
        # What may be gone on with: a chunk, and how many of its actions were handed out.
        self.chunk: Floats = np.zeros((0, 2), np.float32)
        self.place, self.step = 0, -1

    def sees(self, observation: Any) -> Floats | None:
        """The chunk that is current once an observation has come, from the action that is due."""
        self.step += 1
        self.free.act(observation)
        made = self.free.last
        assert made is not None
        return made.action_chunk[self.step - made.step :]

    def clamped(self, planned: Floats) -> Floats:
        limits = self.guards.action_limits
        return planned if limits is None else np.clip(planned, *np.float32(limits))  # type: ignore[arg-type]

    def out(self, planned: Floats) -> Floats:
        action = self.clamped(planned)
        if self.guards.max_change is not None and self.before is not None:
            most = np.float32(self.guards.max_change)
            action = np.clip(action, self.before - most, self.before + most)
        self.before = self.handed = action
        return action

    def act(self, observation: Any) -> Floats:
        chunk = self.sees(observation)
        self.chunk, self.place = chunk, 1
        return self.out(chunk[0])

    def late(self, observation: Any) -> Floats | None:
        if self.guards.on_late is None:
            return self.act(observation)
        self.sees(observation)
        if self.guards.on_late == "hold":
            return self.handed
        if self.guards.on_late == "continue" and self.place < len(self.chunk):
            self.place += 1
            return self.out(self.chunk[self.place - 1])
        return None

    def act_chunk(self, observation: Any) -> Floats:
        self.step += 1
        chunk = self.free.act_chunk(observation)
        self.chunk, self.place = chunk, len(chunk)
        return np.stack([self.out(action) for action in chunk])


def late(robot: EdgePolicy, observation: Any, observation_time: float | None) -> Floats:
    deadline = robot._deadline
    if deadline is None:
        return robot.act(observation, observation_time)
    in_time = deadline.run

    def finished_but_late(work: Any, start: float) -> None:
        del start
        job = deadline._worker.submit(work)
        job.done(-1.0)
        deadline._late.add(job)

    deadline.run = finished_but_late  # type: ignore[method-assign]
    try:
        return robot.act(observation, observation_time)
    finally:
        deadline.run = in_time  # type: ignore[method-assign]


@pytest.mark.parametrize("replan_every", [1, 2, 5])
@pytest.mark.parametrize("on_late", [None, "raise", "hold", "continue"])
def test_every_guard_with_every_other(loaded: EdgePolicy, on_late: Any, replan_every: int) -> None:
    random, free = (
        np.random.default_rng(5),
        policy(loaded, Guards(action_limits=None), replan_every),
    )
    changes = (None, None), (CHANGE, None), (CHANGE, LOW - 10 * (HIGH - LOW))
    for limits, (change, before), stamped in product((None, LIMITS), changes, (False, True)):
        guards = Guards(
            action_limits=limits,
            max_change=change,
            max_age_s=60,
            deadline_s=None if on_late is None else 60,
            on_late=on_late,
        )
        robot = policy(loaded, guards, replan_every)
        for each in (robot, free):
            each.reset(3, from_action=before)
        promised, counted = Promised(free, guards, before), 0
        for call in SCRIPT.split():
            observation = miniature.observation(random)
            stamp = time.monotonic() if stamped else None
            if call == "stale":
                for impossible in (time.monotonic() - 100, time.monotonic() + 100):
                    with pytest.raises(StaleObservationError):
                        robot.act(observation, impossible)
                continue
            expected = getattr(promised, call)(observation)
            counted += call == "late" and on_late is not None
            if expected is None:
                with pytest.raises(DeadlineError, match="no action within"):
                    late(robot, observation, stamp)
                continue
            act = late if call == "late" else getattr(EdgePolicy, call)
            got = act(robot, observation, observation_time=stamp)
            np.testing.assert_array_equal(got, expected)
            assert robot.upcoming is not None
            if (call, on_late) == ("late", "hold"):
                np.testing.assert_array_equal(robot.upcoming, [expected])
            else:
                left = promised.chunk[promised.place - 1 :]
                np.testing.assert_array_equal(robot.upcoming, promised.clamped(left))
            got[:] = 1e9  # is the caller's
        assert robot.guard_counts.late == counted
        assert bool(robot.guard_counts.clamped) is (limits is not None)
        assert bool(robot.guard_counts.slowed) is (change is not None)
