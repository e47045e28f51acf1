"""A robot of several topics: an arm and a base that drives."""

import time
from typing import Any

import pytest
from geometry_msgs.msg import TwistStamped
from nav_msgs.msg import Odometry
from rclpy.time import Time
from robots import (
    IMAGE,
    NAME,
    STATE,
    Observation,
    Robot,
    expected,
    image_message,
    joint_message,
    observations,
    wait,
)
from sensor_msgs.msg import JointState

PARTS: dict[str, Any] = {
    "state.topic": None, "state.joints": None, "command.topic": None, "command.when_stopped": None,
    "state.parts": ["arm", "base"],
    "state.arm.topic": "/joints", "state.arm.joints": ["x"],
    "state.base.topic": "/odom", "state.base.type": "odometry",
    "state.base.joints": ["twist.twist.linear.x"],
    "command.parts": ["arm", "base"],
    "command.arm.topic": "/commands", "command.arm.joints": ["x"],
    "command.arm.when_stopped": "hold",
    "command.base.topic": "/cmd_vel", "command.base.type": "twist_stamped",
    "command.base.joints": ["twist.linear.x"],
}  # fmt: skip


@pytest.mark.parametrize("robot", [PARTS], indirect=True)
def test_an_arm_on_a_base(robot: Robot) -> None:
    """Its commands are the policy's, and a signal leaves the arm where it is and the base still."""
    simulator, seen = robot.simulator, observations(5)
    odometry = simulator.node.create_publisher(Odometry, "/odom", 1)
    driven = simulator.hear(TwistStamped, "/cmd_vel")
    states = simulator.hear(JointState, f"{NAME}/replay/state")
    wait(odometry.get_subscription_count)
    wait(lambda: simulator.node.count_publishers("/cmd_vel"))
    wait(lambda: simulator.node.count_publishers(f"{NAME}/replay/state"))

    def show(observation: Observation) -> None:
        stamp, message = simulator.now(), Odometry()
        message.header.stamp = Time(nanoseconds=stamp).to_msg()
        message.twist.twist.linear.x = float(observation[STATE][1])
        odometry.publish(message)
        joints = joint_message(observation[STATE], ("x",))
        simulator.publish(image_message(observation[IMAGE]), joints, stamp)

    def moving() -> list[TwistStamped]:
        """Before the first observation the base is told to stand."""
        return [each for each in driven if each.twist.linear.x]

    sent = []
    for number, observation in enumerate(seen):
        command = simulator.answer(lambda o=observation: show(o))
        base = wait(lambda n=number: moving()[n:])[0]
        sent.append([*command.data, base.twist.linear.x])
        assert base.header.stamp.sec
        assert base.twist.linear.y == base.twist.angular.z == 0
    assert sent == expected(seen)
    assert wait(lambda: states)[-1].name == ["x", "twist.twist.linear.x"]
    simulator.publish(image_message(seen[0][IMAGE]), joint_message(seen[0][STATE], ("x",)))
    time.sleep(0.1)
    assert len(simulator.commands) == len(seen)  # the base was not heard
    count = len(driven)
    assert robot.process.end() == 0
    assert wait(lambda: driven[count:])[-1].twist.linear.x == 0
    assert list(wait(lambda: simulator.commands[len(seen) :])[-1].data) == sent[-1][:1]
