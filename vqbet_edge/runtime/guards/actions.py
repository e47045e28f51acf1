"""What every action passes on its way to the robot."""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import DeadlineError, NonFiniteError
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.limits import Floats, action_limits, change_limit

_LOG = logging.getLogger(__name__)


class GuardCounts(NamedTuple):
    """How often guards stepped in since the policy was loaded.

    Attributes:
        clamped: planned actions that left the action limits.
        slowed: actions that differed from the one before by more than `max_change`.
        late: calls of `act` that the backend did not answer in time.
        far_states: observations whose state was far from what was demonstrated, or outside
            `state_limits`.
    """

    clamped: int
    slowed: int
    late: int
    far_states: int = 0


class Step(NamedTuple):
    """An action, and the chunk that it is part of."""

    chunk: Floats  # (W, A)
    position: int


class ActionGuard:
    """Clamps planned actions, limits their change, and knows what stands for a late one.

    Args: those of `action_limits`.

    Attributes:
        limits: what planned actions are clamped to; None where they are not.
        clamped, slowed, late: see `GuardCounts`.
    """

    def __init__(self, guards: Guards, data: Floats | None, dim: int) -> None:
        self.limits = action_limits(guards, data, dim)
        self._most_change = change_limit(guards, dim)
        self._guards = guards
        # What was handed out last in this episode, as planned and as it went to the robot; what
        # the next action follows, which before the first may be where the robot stands.
        self._step: Step | None = None
        self._held: Floats | None = None
        self._before: Floats | None = None
        self.clamped = self.slowed = self.late = 0

    def clear(self, before: Floats | None = None) -> None:
        """A new episode begins, where `before` (A,) moved the robot; None where not known."""
        self._step = self._held = None
        self._before = before

    def clamp(self, actions: Floats) -> NDArray[np.bool_]:
        """Clamp planned actions (..., A) in place; says which values were outside.

        Raises:
            NonFiniteError: one is NaN, which no clamp changes.
        """
        if self.limits is None:
            return np.zeros(actions.shape, bool)
        low, high = self.limits
        # Written so that NaN counts as outside.
        outside = ~((actions >= low) & (actions <= high))
        rows = outside.any(axis=-1)
        if rows.any():
            if np.isnan(actions).any():
                raise NonFiniteError("an action is not a number; none is executed")
            if not self.clamped:
                _LOG.warning(
                    "an action %s left the limits %s to %s and was clamped; further ones are "
                    "counted in `policy.guard_counts.clamped`",
                    *(np.array2string(x, precision=4) for x in (actions[rows][0], low, high)),
                )
            self.clamped += int(rows.sum())
            np.clip(actions, low, high, out=actions)
        return outside

    def limit_change(self, action: Floats) -> Floats:
        """The action (A,) as it goes to the robot, near the one before: the caller's own array."""
        own: Floats = action.copy()
        if self._most_change is not None:
            if self._before is not None:
                low, high = self._before - self._most_change, self._before + self._most_change
                np.clip(own, low, high, out=own)
                self.slowed += bool((own != action).any())
            self._before = own.copy()
        self._held = own.copy()
        return own

    def hand_out(self, step: Step) -> Floats:
        """The action of a step of a chunk, likewise."""
        self._step = step
        return self.limit_change(step.chunk[step.position])

    def leave_chunk(self) -> None:
        """What was handed out last is the chunk's last action."""
        if self._step is not None:
            chunk, position = self._step
            self._step = Step(chunk[: position + 1], position)

    def instead(self) -> Floats:
        """What is handed out when the backend is late, as `Guards.on_late` says.

        Raises:
            DeadlineError: there is nothing to return.
        """
        self.late += 1
        match self._guards.on_late:
            case "hold" if self._held is not None:
                held = self._held.copy()
                # Who follows trajectories stays there too.
                self._step = Step(held[None], 0)
                return held.copy()
            case "continue" if self._step is not None:
                chunk, position = self._step
                if position + 1 < len(chunk):
                    return self.hand_out(Step(chunk, position + 1))
        raise DeadlineError(
            f"no action within {self._guards.deadline_s} s; stop the robot, allow more time, or "
            "choose what to return then with Guards(on_late=...)"
        )

    @property
    def upcoming(self) -> Floats | None:
        """See `EdgePolicy.upcoming`."""
        return None if self._step is None else self._step.chunk[self._step.position :].copy()
