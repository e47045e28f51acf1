"""Limits on actions and on their change from step to step, checked and as float32."""

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.guards.config import Guards, PerDimension

Floats = NDArray[np.float32]

_LOG = logging.getLogger(__name__)


class ActionLimits(NamedTuple):
    """Lowest and highest action, float32 (A,) each; the range includes both."""

    low: Floats
    high: Floats


def action_limits(guards: Guards, data: Floats | None, dim: int) -> ActionLimits | None:
    """The limits that the guards ask for; None where there are none.

    `data` is (2, A), the training data's lowest and highest actions; None where not known.

    Raises:
        UsageError: they do not fit actions of `dim` values.
    """
    if guards.action_limits == "data":
        if data is None:
            return None
        low, high = data
        slack = np.float32(guards.margin) * (high - low)
        return ActionLimits(low - slack, high + slack)
    if guards.action_limits is None:
        return None
    return ActionLimits(*given_range("action_limits", guards.action_limits, dim, "in"))


def tell_of_limits(guards: Guards, limits: ActionLimits | None, *, inferred: bool) -> None:
    """Log what a user would not expect of `action_limits="data"`.

    `inferred`: from how actions are scaled, which is the same for quantiles.
    """
    if guards.action_limits != "data":
        return
    if limits is None:
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


def change_limit(guards: Guards, dim: int) -> Floats | None:
    """float32 (A,): the most that an action may differ from the one before; None: anything.

    Raises:
        UsageError: it does not fit actions of `dim` values.
    """
    if guards.max_change is None:
        return None
    step = _per_dimension("max_change", guards.max_change, dim)
    if not (step >= 0).all():
        raise UsageError(f"expected max_change of 0 or more, got {guards.max_change}")
    return _rounded(step, "down")


def given_range(
    name: str, given: object, dim: int, way: Literal["in", "out"]
) -> tuple[Floats, Floats]:
    """The range (lowest, highest) that a caller gives as `name`, as float32 (dim,) each.

    What float32 cannot hold is rounded into the range or out of it.

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
    towards = np.float32(np.inf if way == "up" else -np.inf)
    result: Floats = np.where(beyond, np.nextafter(near, towards), near)
    return result
