"""Where the robot is when an episode begins, so that its first action is no jump."""

import logging
from collections.abc import Sequence

import numpy as np

from vqbet_edge_ros.joints import Values
from vqbet_edge_ros.parts import CommandPart, StatePart

_LOG = logging.getLogger(__name__)


class Anchor:
    """What an episode's first action is compared with by `guards.max_change`.

    Of every part of the command: the measured joints, where commands are positions of joints that
    the state has too; else the last command, unless it was forgotten because others may have moved
    the robot since; else, where a stop is zero, that. If a part has none of them, nothing, which is
    said if changes are `limited`.
    """

    def __init__(
        self, state: Sequence[StatePart], command: Sequence[CommandPart], *, limited: bool
    ) -> None:
        self._state = [part for part in state if part.given.type == "joint_state"]
        self._command = command
        self._silent = not limited

    def __call__(self, state: Values, last: Values | None) -> Values | None:
        """In the units of actions, float64 (A,).

        Args:
            state: of the observation that the episode begins with, (S,), as the policy takes it.
            last: the last command (A,) in ROS's units, if it still counts.
        """
        there = {
            name: value
            for part in self._state
            for name, value in zip(
                part.joints.names, part.joints.to_ros(state[part.places]), strict=True
            )
        }
        starts = [start for part in self._command for start in _start(part, there, last)]
        if len(starts) == len(self._command):
            return np.concatenate(starts)
        if not self._silent:
            _LOG.warning(
                "guards.max_change does not hold on this episode's first action: no command went "
                "before it, and command.joints are not measured positions; it is said once"
            )
            self._silent = True
        return None


def _start(part: CommandPart, there: dict[str, float], last: Values | None) -> list[Values]:
    """Where a part starts from, if that is known."""
    names = part.joints.names
    if part.positions and there.keys() >= set(names):
        return [part.joints.from_ros(np.array([there[name] for name in names]))]
    if last is not None:
        return [part.joints.from_ros(last[part.places])]
    return [part.joints.from_ros(np.zeros(len(names)))] if part.when_stopped == "zero" else []
