"""Two processes, a robot and the node: what comes out of what goes in."""

import array
import io
import itertools
import json
import time
from typing import Any

import numpy as np
import PIL.Image
import pytest
from rclpy.duration import Duration
from rclpy.time import Time
from robots import (
    BUNDLE,
    IMAGE,
    NAME,
    STATE,
    Robot,
    expected,
    image_message,
    joint_message,
    observations,
    wait,
)
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from vqbet_edge import EdgePolicy

# Encoding, padding and joints of the messages: the commands are the same.
FORMS: list[tuple[str, int, tuple[str, ...]]] = [
    ("rgb8", 0, ("x", "y")),
    ("bgr8", 0, ("y", "x")),
    ("rgb8", 24, ("other", "y", "another", "x")),
]


def test_commands_are_bitwise_those_of_the_policy_in_process(robot: Robot) -> None:
    """Whatever the form of messages; who listens sees the exact observations and actions."""
    simulator = robot.simulator
    frames = simulator.hear(Image, f"{NAME}/replay/image_0")
    states = simulator.hear(JointState, f"{NAME}/replay/state")
    actions = simulator.hear(JointState, f"{NAME}/replay/action")
    decisions = simulator.hear(String, f"{NAME}/decision")
    metadata = simulator.hear(String, f"{NAME}/metadata", latched=True)
    for topic in ("replay/image_0", "replay/state", "replay/action", "decision"):
        wait(lambda topic=topic: simulator.node.count_publishers(f"{NAME}/{topic}"))
    seen, sent = observations(30), []
    for number, observation in enumerate(seen):
        encoding, padding, names = FORMS[number % len(FORMS)]
        image = image_message(observation[IMAGE], encoding, padding)
        joints = joint_message(observation[STATE], names)
        sent.append(simulator.answer(lambda i=image, j=joints: simulator.publish(i, j)))
    sent = [list(each.data) for each in sent]
    wait(lambda: len(actions) >= 29)
    for frame, state, action in zip(frames[-5:], states[-5:], actions[-5:], strict=True):
        number = sent.index(list(action.position))
        assert bytes(frame.data) == seen[number][IMAGE].tobytes()
        assert (np.array(state.position) == seen[number][STATE]).all()
        assert list(state.name) == list(action.name) == ["x", "y"]
        assert frame.header.stamp == state.header.stamp == action.header.stamp
    with EdgePolicy.load(BUNDLE, "onnxruntime", seed=7) as policy:
        codes, last = [], None
        for observation, action in zip(seen, sent, strict=True):
            assert action == policy.act(observation).tolist()
            if policy.last is not last:
                last = policy.last
                codes.append(last.codes.tolist())
        digest = policy.manifest.manifest_sha256
    heard = [json.loads(each.data) for each in decisions]
    # Whoever listens from the middle on has missed the first ones.
    assert len(heard) >= len(codes) - 1
    assert [each["codes"] for each in heard] == codes[-len(heard) :]
    np.testing.assert_allclose(np.array(heard[-1]["probabilities"]).sum(axis=-1), 1)
    told = json.loads(wait(lambda: metadata)[0].data)
    assert (told["manifest_sha256"], told["backend"]) == (digest, "onnxruntime")


PNG = {
    "cameras.topics": ["/camera/compressed"], "command.type": "joint_state", "max_skew": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("robot", [PNG], indirect=True)
def test_compressed_images_and_joint_states_without_stamps(robot: Robot) -> None:
    """The same frame, and so the same command; the time of arrival counts."""
    simulator, [observation] = robot.simulator, observations(1)
    out = io.BytesIO()
    PIL.Image.fromarray(observation[IMAGE]).save(out, "PNG")
    image = CompressedImage(format="png", data=array.array("B", out.getvalue()))
    joints = joint_message(observation[STATE])
    sent = simulator.answer(lambda: simulator.publish(image, joints, 0))
    assert list(sent.name) == ["x", "y"]
    assert [list(sent.position)] == expected([observation])
    assert sent.header.stamp.sec


TRAJECTORY = {"command.type": "trajectory", "rate": 50.0, "command.when_stopped": "hold"}


@pytest.mark.parametrize("robot", [TRAJECTORY], indirect=True)
def test_trajectories(robot: Robot) -> None:
    """A chunk at a time, with the times of its points."""
    [observation] = observations(1)
    sent = robot.simulator.act(observation)
    with EdgePolicy.load(BUNDLE, "onnxruntime", seed=7) as policy:
        chunk = policy.act_chunk(observation)
    assert [list(point.positions) for point in sent.points] == chunk.tolist()
    times = [Duration.from_msg(each.time_from_start).nanoseconds for each in sent.points]
    assert times == [20_000_000 * (step + 1) for step in range(len(chunk))]
    assert list(sent.joint_names) == ["x", "y"]
    assert (sent.header.stamp.sec, sent.header.stamp.nanosec) == (0, 0)


SIMULATED: dict[str, Any] = {
    "use_sim_time": True, "stamps": "receive", "rate": 20.0, "max_skew": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("robot", [SIMULATED], indirect=True)
def test_a_simulations_time_is_the_loops(robot: Robot) -> None:
    """While it stands there are no steps."""
    simulator, [observation] = robot.simulator, observations(1)
    clock = simulator.node.create_publisher(Clock, "/clock", 10)
    wait(clock.get_subscription_count)
    now = itertools.count(100, 0.05)

    def goes_on() -> bool:
        simulator.show(observation)
        clock.publish(Clock(clock=Time(seconds=next(now)).to_msg()))
        return len(simulator.commands) >= 10

    wait(goes_on)
    time.sleep(0.2)  # a step may be under way
    simulator.stands()
