"""States that are far from everything that was demonstrated: degrees for radians, another order."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import ObservationError, UsageError
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.limits import Floats, given_range

# A value that was constant is far once it differs by more than rounding: the network sees its
# differences divided by 1e-8.
_ROUNDING = np.float32(1e-5)
_LOG = logging.getLogger(__name__)


class StateGuard:
    """Warns of the first far state of an episode, or refuses every one; counts them in `far`.

    `data` is (2, S), the lowest and highest demonstrated state; None where not known.

    Raises:
        UsageError: the limits do not fit, or the data's are asked for and not known.
    """

    def __init__(self, guards: Guards, data: Floats | None, key: str, dim: int) -> None:
        asked, self._key = guards.state_limits, key
        self._refuses, self._told, self.far = asked is not None, False, 0
        # Which states are not far, and the range that messages name.
        self._limits: tuple[Floats, Floats] | None = None
        if asked is not None and asked != "data":
            self._limits = self._named = given_range("state_limits", asked, dim, "out")
        elif data is not None:
            low, high = self._named = data[0], data[1]
            # Honest robots leave the range a little; other units leave it by far.
            slack = np.maximum(high - low, _ROUNDING * np.maximum(1, np.abs(high)))
            self._limits = low - slack, high + slack
        elif asked == "data":
            raise UsageError(
                "state_limits='data': the bundle does not know the range of the states that it "
                "was trained on; pass Guards(state_limits=(lowest, highest))"
            )

    def clear(self) -> None:
        """A new episode begins."""
        self._told = False

    def check(self, state: NDArray[Any]) -> None:
        """Look at a finite state (S,) or (1, S), in the robot's units.

        Raises:
            ObservationError: it is far, and such states are refused.
        """
        if self._limits is None:
            return
        outside = (state < self._limits[0]) | (state > self._limits[1])
        if outside.any():
            self._found(state.reshape(-1), int(np.flatnonzero(outside)[0]))

    def _found(self, state: NDArray[Any], place: int) -> None:
        self.far += 1
        low, high = (values[place] for values in self._named)
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
