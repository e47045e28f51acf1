"""Two processes, a robot and the node: what comes out of what goes in."""

import array
import io
import json
import time
from typing import Any

import numpy as np
import PIL.Image
import pytest
from rclpy.time import Time
from robots import (
    BUNDLE,
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
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from vqbet_edge import EdgePolicy


def decided(seen: list[Observation]) -> tuple[Any, list[list[int]]]:
    """The bundle's manifest, and the codes that the policy chooses in this process."""
    codes, last = [], None
    with EdgePolicy.load(BUNDLE, "onnxruntime", seed=7) as policy:
        for observation in seen:
            policy.act(observation)
            if policy.last is not None and policy.last is not last:
                codes.append(policy.last.codes.tolist())
            last = policy.last
        return policy.manifest, codes


def test_commands_are_bitwise_those_of_the_policy_in_process(robot: Robot) -> None:
    """And who listens sees the exact observations and actions, and every decision."""
    simulator = robot.simulator
    frames = simulator.hear(Image, f"{NAME}/replay/image_0")
    states = simulator.hear(JointState, f"{NAME}/replay/state")
    actions = simulator.hear(JointState, f"{NAME}/replay/action")
    decisions = simulator.hear(String, f"{NAME}/decision")
    metadata = simulator.hear(String, f"{NAME}/metadata", latched=True)
    for topic in ("replay/image_0", "replay/state", "replay/action", "decision"):
        wait(lambda topic=topic: simulator.node.count_publishers(f"{NAME}/{topic}"))
    seen = observations(40)
    sent = [list(simulator.act(observation).data) for observation in seen]
    assert sent == expected(seen)
    wait(lambda: len(actions) >= 39)
    for frame, state, action in zip(frames[-5:], states[-5:], actions[-5:], strict=True):
        number = sent.index(list(action.position))
        assert bytes(frame.data) == seen[number][IMAGE].tobytes()
        assert (np.array(state.position) == seen[number][STATE]).all()
        assert list(state.name) == list(action.name) == ["x", "y"]
        assert frame.header.stamp == state.header.stamp == action.header.stamp
    manifest, codes = decided(seen)
    heard = [json.loads(each.data) for each in decisions]
    # Whoever listens from the middle on has missed the first ones.
    assert len(heard) >= len(codes) - 1
    assert [each["codes"] for each in heard] == codes[-len(heard) :]
    np.testing.assert_allclose(np.array(heard[-1]["probabilities"]).sum(axis=-1), 1)
    told = json.loads(wait(lambda: metadata)[0].data)
    assert told["manifest_sha256"] == manifest.manifest_sha256
    assert told["backend"] == "onnxruntime"


FORMS: list[dict[str, Any]] = [
    {"encoding": "rgb8", "padding": 0, "names": ("x", "y")},
    {"encoding": "bgr8", "padding": 0, "names": ("y", "x")},
    {"encoding": "rgb8", "padding": 24, "names": ("other", "y", "another", "x")},
    {"encoding": "bgr8", "padding": 3, "names": ("x", "other", "y")},
]


def test_the_form_of_messages_does_not_matter(robot: Robot) -> None:
    """bgr8 for rgb8, padded rows and shuffled joints: the same commands, to the bit."""
    simulator, seen = robot.simulator, observations(12, seed=1)
    sent = []
    for number, observation in enumerate(seen):
        form = FORMS[number % len(FORMS)]
        image = image_message(observation[IMAGE], form["encoding"], form["padding"])
        joints = joint_message(observation[STATE], form["names"])
        command = simulator.answer(
            lambda image=image, joints=joints: simulator.publish(image, joints)
        )
        sent.append(list(command.data))
    assert sent == expected(seen)


@pytest.mark.parametrize("robot", [{"stamps": "header", "max_skew": 5.0}], indirect=True)
def test_where_there_are_no_stamps_the_time_of_arrival_counts(robot: Robot) -> None:
    [observation] = observations(1)
    assert len(robot.simulator.answer(lambda: robot.simulator.show(observation, 0)).data) == 2


@pytest.mark.parametrize("robot", [{"command.type": "joint_state"}], indirect=True)
def test_joint_states(robot: Robot) -> None:
    seen = observations(4)
    sent = [robot.simulator.act(observation) for observation in seen]
    assert [list(each.position) for each in sent] == expected(seen)
    assert {tuple(each.name) for each in sent} == {("x", "y")}
    assert all(each.header.stamp.sec for each in sent)


TRAJECTORY = {"command.type": "trajectory", "rate": 50.0, "command.when_stopped": "hold"}


@pytest.mark.parametrize("robot", [TRAJECTORY], indirect=True)
def test_trajectories(robot: Robot) -> None:
    """A chunk at a time, with the times of its points."""
    [observation] = observations(1)
    sent = robot.simulator.act(observation)
    with EdgePolicy.load(BUNDLE, "onnxruntime", seed=7) as policy:
        chunk = policy.act_chunk(observation)
    assert [list(point.positions) for point in sent.points] == chunk.tolist()
    times = [
        each.time_from_start.sec * 10**9 + each.time_from_start.nanosec for each in sent.points
    ]
    assert times == [20_000_000 * (step + 1) for step in range(len(chunk))]
    assert list(sent.joint_names) == ["x", "y"]
    assert (sent.header.stamp.sec, sent.header.stamp.nanosec) == (0, 0)


DEGREES = {
    "state.units": "degrees", "state.offset": [1.0, -2.0], "command.when_stopped": "hold",
}  # fmt: skip


@pytest.mark.parametrize("robot", [DEGREES], indirect=True)
def test_degrees(robot: Robot) -> None:
    """The policy's state is in degrees, and what it commands goes out in radians."""
    [observation] = observations(1)
    radians = np.deg2rad(observation[STATE].astype(np.float64) - [1.0, -2.0])
    image, joints = image_message(observation[IMAGE]), joint_message(radians)
    sent = robot.simulator.answer(lambda: robot.simulator.publish(image, joints))
    [action] = expected([observation])
    np.testing.assert_allclose(np.rad2deg(sent.data) + np.array([1.0, -2.0]), action, rtol=1e-4)


PNG = {"cameras.topics": ["/camera/compressed"]}


@pytest.mark.parametrize("robot", [PNG], indirect=True)
def test_compressed_images(robot: Robot) -> None:
    """The same frame, and so the same command."""
    simulator, [observation] = robot.simulator, observations(1)
    out = io.BytesIO()
    PIL.Image.fromarray(observation[IMAGE]).save(out, "PNG")
    image = CompressedImage(format="png", data=array.array("B", out.getvalue()))
    joints = joint_message(observation[STATE])
    sent = simulator.answer(lambda: simulator.publish(image, joints))
    assert [list(sent.data)] == expected([observation])


SIMULATED = {"use_sim_time": True, "stamps": "receive", "rate": 20.0, "max_skew": 5.0}


@pytest.mark.parametrize("robot", [SIMULATED], indirect=True)
def test_a_simulations_time_is_the_loops(robot: Robot) -> None:
    """A second of the simulation is twenty steps, however long it takes; while it stands, none."""
    simulator, [observation] = robot.simulator, observations(1)
    clock = simulator.node.create_publisher(Clock, "/clock", 10)
    wait(clock.get_subscription_count)

    def run(start: float, seconds: float) -> int:
        """How many commands come while the clock goes on from `start`, in a second and a half."""
        before = len(simulator.commands)
        for part in np.linspace(0, 1, 150):
            clock.publish(Clock(clock=Time(seconds=start + part * seconds).to_msg()))
            simulator.show(observation)
            time.sleep(0.01)
        return len(simulator.commands) - before

    run(100.0, 0.0)  # it jumps there from zero
    assert run(100.0, 0.0) == 0
    assert 8 <= run(100.0, 0.5) <= 11
    run(5.0, 0.1)  # the simulation began anew
    assert 8 <= run(5.1, 0.5) <= 11
