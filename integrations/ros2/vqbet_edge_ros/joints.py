"""Joints by name, in the policy's units and in those of ROS."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import ObservationError, UsageError
from vqbet_edge_ros.parameters import CommandType, StateType, Units

Values = NDArray[np.float64]

_TWIST = tuple(f"{what}.{axis}" for what in ("linear", "angular") for axis in "xyz")
_POSE = (*(f"position.{axis}" for axis in "xyz"), *(f"orientation.{axis}" for axis in "xyzw"))
# Of messages that are not of joints: where their numbers stand.
NUMBERS: dict[StateType | CommandType, tuple[str, ...]] = {
    "pose": tuple(f"pose.{name}" for name in _POSE),
    "odometry": (
        *(f"pose.pose.{name}" for name in _POSE),
        *(f"twist.twist.{name}" for name in _TWIST),
    ),
    "twist": _TWIST,
    "twist_stamped": tuple(f"twist.{name}" for name in _TWIST),
}


class Joints:
    """Joints in the policy's order: policy = scale * ros + offset.

    With the units `degrees`, ROS's radians are turned into degrees first.
    """

    def __init__(
        self,
        names: Sequence[str],
        units: Units = "as_is",
        scale: Sequence[float] = (),
        offset: Sequence[float] = (),
    ) -> None:
        self.names = tuple(names)
        if len(set(self.names)) != len(self.names):
            raise UsageError(f"expected every joint once, got {list(self.names)}")
        factor = 180 / np.pi if units == "degrees" else 1.0
        self._scale = _per_joint("scale", scale, self.names, 1.0) * factor
        self._offset = _per_joint("offset", offset, self.names, 0.0)
        if not (self._scale != 0).all():
            raise UsageError(f"expected a scale other than 0, got {list(scale)}")

    def read(self, message: Any, kind: StateType = "joint_state") -> Values:
        """The policy's state, float64 (J,), of a message of this kind.

        Joints of a `sensor_msgs/JointState` are found by name, in whatever order; of other messages
        the names are where numbers stand, as `ros2 topic echo` shows them (`NUMBERS`).

        Raises:
            ObservationError: a joint is missing, comes twice or is not finite.
        """
        match kind:
            case "joint_state":
                values = self._by_name(message, message.position, "positions")
            case "joint_velocity":
                values = self._by_name(message, message.velocity, "velocities")
            case "joint_effort":
                values = self._by_name(message, message.effort, "efforts")
            case _:
                values = np.array([attrgetter(name)(message) for name in self.names], np.float64)
        if not np.isfinite(values).all():
            bad = dict(zip(self.names, values.tolist(), strict=True))
            raise ObservationError(f"expected finite numbers, got {bad}")
        return self.from_ros(values)

    def _by_name(self, message: Any, numbers: Sequence[float], what: str) -> Values:
        names = list(message.name)
        if len(names) != len(numbers):
            raise ObservationError(f"expected {len(names)} {what}, got {len(numbers)}")
        missing = [name for name in self.names if name not in names]
        if missing:
            raise ObservationError(
                f"expected the joints {list(self.names)} in one message, without {missing} got "
                f"{names}; merge the messages of several drivers with joint_state_broadcaster or "
                "joint_state_publisher, or read them as state.parts"
            )
        twice = [name for name in self.names if names.count(name) > 1]
        if twice:
            raise ObservationError(f"expected every joint once, got {twice} more than once")
        return np.array([numbers[names.index(name)] for name in self.names], np.float64)

    def from_ros(self, values: Values) -> Values:
        """Values (..., J) in the policy's units."""
        return self._scale * values + self._offset

    def to_ros(self, actions: NDArray[np.floating]) -> Values:
        """Actions (..., J) in ROS's units."""
        converted: Values = (np.asarray(actions, np.float64) - self._offset) / self._scale
        return converted


def _per_joint(what: str, given: Sequence[float], names: Sequence[str], default: float) -> Values:
    if len(given) not in {0, len(names)}:
        raise UsageError(f"expected {what} for {len(names)} joints, got {len(given)}")
    values = np.array(given or [default] * len(names), np.float64)
    if not np.isfinite(values).all():
        raise UsageError(f"expected a finite {what}, got {list(given)}")
    return values
