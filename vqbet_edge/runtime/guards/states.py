"""States that are far from everything that was demonstrated: degrees for radians, another order."""

import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import ObservationError, UsageError
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.limits import Floats, given_range

# A value that was constant is far once it differs by more than rounding: the network sees its
# differences divided by 1e-8.
_ROUNDING = np.float32(1e-5)
_LOG = logging.getLogger(__name__)


class _Limits(NamedTuple):
    """Which states are not far, float32 (S,) each, and the range that messages name."""

    low: Floats
    high: Floats
    named: tuple[Floats, Floats]


class StateGuard:
    """Warns of the first far state of an episode, or refuses every one; counts them.

    Args:
        guards: what is asked for.
        data: (2, S), the lowest and highest demonstrated state; None where not known.
        key: the state's, for messages.
        dim: S.

    Attributes:
        far: states that were far, so far.

    Raises:
        UsageError: the limits do not fit, or the data's are asked for and not known.
    """

    def __init__(self, guards: Guards, data: Floats | None, key: str, dim: int) -> None:
        self._key, self._refuses = key, guards.state_limits is not None
        self._limits = _limits(guards, data, dim)
        self._told = False
        self.far = 0

    def clear(self) -> None:
        """A new episode begins."""
        self._told = False

    def check(self, state: NDArray[Any]) -> None:
        """Look at a finite state (S,) or (1, S), in the robot's units.

        Raises:
            ObservationError: it is far, and such states are refused.
        """
        limits = self._limits
        if limits is None:
            return
        outside = (state < limits.low) | (state > limits.high)
        if outside.any():
            self._found(state.reshape(-1), int(np.flatnonzero(outside)[0]), limits)

    def _found(self, state: NDArray[Any], place: int, limits: _Limits) -> None:
        self.far += 1
        low, high = (values[place] for values in limits.named)
        what = f"'{self._key}'[{place}]: expected {low:.6g} to {high:.6g}, got {state[place]:.6g}"
        if self._refuses:
            raise ObservationError(
                f"{what}; look at the state's units and the order of its values, or allow more "
                "with Guards(state_limits=(lowest, highest))"
            )
        if not self._told:
            self._told = True
            _LOG.warning(
                "%s, far from what was demonstrated; look at the state's units and the order of "
                "its values. Further ones are counted in `policy.guard_counts.far_states`; "
                "Guards(state_limits='data') refuses them",
                what,
            )


def _limits(guards: Guards, data: Floats | None, dim: int) -> _Limits | None:
    match guards.state_limits:
        case None | "data" if data is not None:
            low, high = data
            # Honest robots leave the range a little; other units leave it by far.
            slack = np.maximum(high - low, _ROUNDING * np.maximum(1, np.abs(high)))
            return _Limits(low - slack, high + slack, (low, high))
        case None:
            return None
        case "data":
            raise UsageError(
                "state_limits='data': the bundle does not know the range of the states that it "
                "was trained on; pass Guards(state_limits=(lowest, highest))"
            )
        case given:
            pair = given_range("state_limits", given, dim, "out")
            return _Limits(*pair, pair)
