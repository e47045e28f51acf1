"""Joints by name, in the policy's units and in those of ROS."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import ObservationError, UsageError
from vqbet_edge_ros.parameters import Units

Values = NDArray[np.float64]


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

    def read(self, message: Any) -> Values:
        """The policy's state, float64 (J,), of a `sensor_msgs/JointState` in whatever order.

        Raises:
            ObservationError: a joint is missing, comes twice or is not finite.
        """
        names, positions = list(message.name), message.position
        if len(names) != len(positions):
            raise ObservationError(f"expected {len(names)} positions, got {len(positions)}")
        missing = [name for name in self.names if name not in names]
        if missing:
            raise ObservationError(
                f"expected the joints {list(self.names)} in one message, without {missing} got "
                f"{names}; merge the messages of several drivers with joint_state_broadcaster or "
                "joint_state_publisher"
            )
        twice = [name for name in self.names if names.count(name) > 1]
        if twice:
            raise ObservationError(f"expected every joint once, got {twice} more than once")
        values = np.array([positions[names.index(name)] for name in self.names], np.float64)
        if not np.isfinite(values).all():
            bad = dict(zip(self.names, values.tolist(), strict=True))
            raise ObservationError(f"expected finite positions, got {bad}")
        return self.from_ros(values)

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
