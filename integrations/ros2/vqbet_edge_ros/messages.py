"""ROS messages of what the other modules compute."""

import array
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, Twist, TwistStamped
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rclpy.duration import Duration
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vqbet_edge import Decision
from vqbet_edge_ros.parameters import CommandType

COMMANDS: dict[str, Any] = {
    "array": Float64MultiArray,
    "trajectory": JointTrajectory,
    "joint_state": JointState,
    "twist": Twist,
    "twist_stamped": TwistStamped,
}
# By the kind of an `Input`.
INPUTS: dict[str, Any] = {
    "image": Image,
    "compressed": CompressedImage,
    **dict.fromkeys(("joint_state", "joint_velocity", "joint_effort"), JointState),
    "pose": PoseStamped,
    "odometry": Odometry,
}


def command(
    kind: CommandType, names: tuple[str, ...], rows: NDArray[np.float64], period: float, stamp: Any
) -> Any:
    """A command (n, J), one row per `period` seconds from now on; n is 1 but for trajectories."""
    match kind:
        case "array":
            return Float64MultiArray(data=rows[0].tolist())
        case "joint_state":
            return joint_state(names, rows[0], stamp)
        case "trajectory":
            # A stamp of zero: from the moment at which the controller gets it.
            message = JointTrajectory(joint_names=list(names))
            message.points = [
                JointTrajectoryPoint(
                    positions=row.tolist(),
                    time_from_start=Duration(nanoseconds=round((step + 1) * period * 1e9)).to_msg(),
                )
                for step, row in enumerate(rows)
            ]
            return message
        case "twist":
            return _with_numbers(Twist(), names, rows[0])
        case "twist_stamped":
            message = _with_numbers(TwistStamped(), names, rows[0])
            message.header.stamp = stamp
            return message


def _with_numbers(message: Any, names: tuple[str, ...], values: NDArray[np.float64]) -> Any:
    """The message with numbers at places such as `twist.linear.x`; all others are 0."""
    for name, value in zip(names, values.tolist(), strict=True):
        *path, last = name.split(".")
        place = message
        for each in path:
            place = getattr(place, each)
        setattr(place, last, value)
    return message


def joint_state(names: Sequence[str], values: NDArray[np.floating], stamp: Any) -> Any:
    """Values by name."""
    message = JointState(name=list(names), position=np.asarray(values, np.float64).tolist())
    message.header.stamp = stamp
    return message


def image(frame: NDArray[np.uint8], stamp: Any) -> Any:
    """A frame (H, W, 3) as rgb8."""
    height, width, _ = frame.shape
    # Of an array of bytes rclpy takes the whole, of anything else every byte by itself.
    data = array.array("B", frame.tobytes())
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width, data=data)
    message.header.stamp = stamp
    return message


def decision(made: Decision, stamp: Any) -> Any:
    """Codes, their probabilities, and how long each stage took, as JSON."""
    text = {
        "stamp": stamp.sec + stamp.nanosec / 1e9,
        "codes": made.codes.tolist(),
        "probabilities": made.code_probabilities.tolist(),
        "clamped": bool(made.clamped.any()),
        "seconds": made.seconds,
    }
    return String(data=json.dumps(text))


def diagnostics(name: str, level: bytes, text: str, values: dict[str, str], stamp: Any) -> Any:
    """One status."""
    pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
    status = DiagnosticStatus(
        level=level, name=f"{name}: policy", message=text, hardware_id=name, values=pairs
    )
    message = DiagnosticArray(status=[status])
    message.header.stamp = stamp
    return message
