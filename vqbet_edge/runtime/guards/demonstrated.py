"""The range of what was demonstrated, where a bundle knows it."""

import logging
from typing import NamedTuple

from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.limits import Floats

_LOG = logging.getLogger(__name__)


class Demonstrated(NamedTuple):
    """Lowest and highest values of the training data, in the robot's units.

    Attributes:
        action: float32 (2, A); None where not known.
        state: float32 (2, S); likewise.
        exact: False where the range may be that of quantiles, which some of the data leave.
    """

    action: Floats | None
    state: Floats | None
    exact: bool

    def tell(self, guards: Guards) -> None:
        """Log what a user would not expect of `action_limits="data"`."""
        if guards.action_limits != "data":
            return
        if self.action is None:
            _LOG.warning(
                "the bundle does not know the range of the actions that it was trained on, so no "
                "action is clamped; pass Guards(action_limits=(lowest, highest)) in the robot's "
                "units, or action_limits=None to leave it so"
            )
        elif not self.exact:
            _LOG.warning(
                "the bundle has an older format, whose range of actions may be that of quantiles: "
                "actions may be clamped that were demonstrated; export its checkpoint again, or "
                "pass Guards(action_limits=(lowest, highest)) in the robot's units"
            )
