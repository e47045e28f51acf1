"""What every action passes on its way to the robot."""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.limits import ActionLimits, Floats, action_limits, change_limit

_LOG = logging.getLogger(__name__)


class GuardCounts(NamedTuple):
    """How often guards stepped in since the policy was loaded.

    Attributes:
        clamped: planned actions that left the action limits.
        slowed: actions that differed from the one before by more than `max_change`.
        late: calls of `act` that the backend did not answer in time.
    """

    clamped: int
    slowed: int
    late: int


class ActionGuard:
    """Clamps planned actions and limits their change; counts both, and warns of the first clamp.

    Args: those of `action_limits`.
    """

    def __init__(self, guards: Guards, data: Floats | None, dim: int) -> None:
        self._limits = action_limits(guards, data, dim)
        self._change = change_limit(guards, dim)
        self.clamped = self.slowed = 0

    @property
    def limits(self) -> ActionLimits | None:
        """What planned actions are clamped to."""
        return self._limits

    def clear(self, before: Floats | None = None) -> None:
        """A new episode begins, where `before` (A,) moved the robot; None where not known."""
        if self._change is not None:
            self._change.clear(before)

    def planned(self, actions: Floats) -> NDArray[np.bool_]:
        """Clamp actions (..., A) in place; says which values were outside."""
        if self._limits is None:
            return np.zeros(actions.shape, bool)
        before = actions.copy()
        outside = self._limits.clamp(actions)
        rows = outside.any(axis=-1)
        if rows.any():
            if not self.clamped:
                _warn(before[rows][0], self._limits)
            self.clamped += int(rows.sum())
        return outside

    def handed_out(self, action: Floats) -> Floats:
        """The action (A,) or (B, A) as it goes to the robot: the caller's own array."""
        own: Floats = action.copy()
        if self._change is not None:
            self.slowed += self._change.apply(own)
        return own


def _warn(action: Floats, limits: ActionLimits) -> None:
    _LOG.warning(
        "an action %s left the limits %s to %s and was clamped; further ones are counted in "
        "`policy.guard_counts.clamped`",
        *(np.array2string(values, precision=4) for values in (action, limits.low, limits.high)),
    )
