"""Where the robot is when an episode begins, so that its first action is no jump."""

import logging

import numpy as np

from vqbet_edge_ros.joints import Joints, Values

_LOG = logging.getLogger(__name__)


class Anchor:
    """What an episode's first action is compared with by `guards.max_change`.

    The measured joints, where commands are `positions` of joints that the state has too; else the
    last command, unless it was forgotten because others may have moved the robot since; else
    nothing, which is said if changes are `limited`.
    """

    def __init__(self, state: Joints, command: Joints, *, positions: bool, limited: bool) -> None:
        self._state, self._command = state, command
        self._measured = positions and set(command.names) <= set(state.names)
        self._silent = not limited

    def __call__(self, state: Values, last: Values | None) -> Values | None:
        """In the units of actions, float64 (A,).

        Args:
            state: of the observation that the episode begins with, (S,), as the policy takes it.
            last: the last command (A,) in ROS's units, if it still counts.
        """
        if self._measured:
            there = dict(zip(self._state.names, self._state.to_ros(state), strict=True))
            last = np.array([there[name] for name in self._command.names])
        if last is not None:
            return self._command.from_ros(last)
        if not self._silent:
            _LOG.warning(
                "guards.max_change does not hold on this episode's first action: no command went "
                "before it, and command.joints are not measured positions; it is said once"
            )
            self._silent = True
        return None
