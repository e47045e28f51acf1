"""Limits on actions and on their change from step to step."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import NonFiniteError, UsageError
from vqbet_edge.runtime.guards.config import Guards, PerDimension

Floats = NDArray[np.float32]

_LOG = logging.getLogger(__name__)


class ActionLimits:
    """Clamps actions to a range.

    Attributes:
        low, high: float32 (A,); the range includes both.
    """

    def __init__(self, low: Floats, high: Floats) -> None:
        self.low, self.high = low, high

    def clamp(self, actions: Floats) -> NDArray[np.bool_]:
        """Clamp actions (..., A) in place; says which values were outside.

        Raises:
            NonFiniteError: one is NaN, which no clamp changes.
        """
        # Written so that NaN counts as outside.
        outside = ~((actions >= self.low) & (actions <= self.high))
        np.clip(actions, self.low, self.high, out=actions)
        if np.isnan(actions).any():
            raise NonFiniteError("an action is not a number; none is executed")
        return outside


class ChangeLimit:
    """Keeps every action within `step` (A,) of the one before."""

    def __init__(self, step: Floats) -> None:
        self._step = step
        self._before: Floats | None = None

    def clear(self, before: Floats | None = None) -> None:
        """The next action follows `before` (A,); None: it follows none."""
        self._before = before

    def apply(self, action: Floats) -> bool:
        """Limit an action (A,) or (B, A) in place; says whether it was changed."""
        changed = False
        if self._before is not None:
            near = np.clip(action, self._before - self._step, self._before + self._step)
            changed = bool((near != action).any())
            action[...] = near
        self._before = action.copy()
        return changed


def action_limits(guards: Guards, data: Floats | None, dim: int) -> ActionLimits | None:
    """The limits that the guards ask for; None where there are none.

    Args:
        guards: what they ask for.
        data: (2, A), the training data's lowest and highest actions; None where not known.
        dim: width of an action.

    Raises:
        UsageError: they do not fit actions of `dim` values.
    """
    match guards.action_limits:
        case None:
            return None
        case "data":
            return _data_limits(data, guards.margin)
        case given:
            return ActionLimits(*given_range("action_limits", given, dim, "in"))


def tell_of_limits(guards: Guards, data: Floats | None, *, inferred: bool) -> None:
    """Log what a user would not expect of `action_limits="data"`.

    Args:
        guards: what they ask for.
        data: as for `action_limits`.
        inferred: from how actions are scaled, which is the same for quantiles.
    """
    if guards.action_limits != "data":
        return
    if data is None:
        _LOG.warning(
            "the bundle does not know the range of the actions that it was trained on: no action "
            "is clamped; pass Guards(action_limits=(lowest, highest)) in the robot's units, or "
            "action_limits=None to leave it so"
        )
    elif inferred:
        _LOG.warning(
            "the bundle has an older format, whose range of actions may be that of quantiles: "
            "demonstrated actions may be clamped; export its checkpoint again, or pass "
            "Guards(action_limits=(lowest, highest)) in the robot's units"
        )


def change_limit(guards: Guards, dim: int) -> ChangeLimit | None:
    """The limit that the guards ask for; None where there is none.

    Raises:
        UsageError: it does not fit actions of `dim` values.
    """
    if guards.max_change is None:
        return None
    step = _per_dimension("max_change", guards.max_change, dim)
    if not (step >= 0).all():
        raise UsageError(f"expected max_change of 0 or more, got {guards.max_change}")
    return ChangeLimit(_rounded(step, "down"))


def _data_limits(data: Floats | None, margin: float) -> ActionLimits | None:
    if data is None:
        return None
    low, high = data
    slack = np.float32(margin) * (high - low)
    return ActionLimits(low - slack, high + slack)


def given_range(
    name: str, given: object, dim: int, way: Literal["in", "out"]
) -> tuple[Floats, Floats]:
    """The range (lowest, highest) that a caller gives, as float32 (dim,) each.

    Args:
        name: what it is called.
        given: a pair of numbers, or of one number per dimension.
        dim: how many there are.
        way: where what float32 cannot hold is rounded to: into the range or out of it.

    Raises:
        UsageError: it is no range of that width.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise UsageError(f"expected {name} of 'data', (lowest, highest) or None, got {given!r}")
    low, high = (_per_dimension(name, values, dim) for values in given)
    if not (low <= high).all():
        raise UsageError(f"expected {name} (lowest, highest), got {given}")
    inwards = way == "in"
    return _rounded(low, "up" if inwards else "down"), _rounded(high, "down" if inwards else "up")


def _per_dimension(name: str, values: PerDimension, dim: int) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    if array.shape not in {(), (dim,)} or np.isnan(array).any():
        raise UsageError(f"expected {name} of one number or {dim}, got {values!r}")
    return np.broadcast_to(array, (dim,))


def _rounded(values: NDArray[np.float64], way: Literal["up", "down"]) -> Floats:
    """To float32, never beyond the given value."""
    near = values.astype(np.float32)
    beyond = near < values if way == "up" else near > values
    inwards = np.nextafter(near, np.float32(np.inf if way == "up" else -np.inf))
    result: Floats = np.where(beyond, inwards, near)
    return result
