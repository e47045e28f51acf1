"""Two processes: what goes wrong on one side, and that the robot stands still."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from robots import (
    BUNDLE,
    IMAGE,
    SIZE,
    STATE,
    Robot,
    Simulator,
    image_message,
    joint_message,
    observations,
    slow_call,
    wait,
)
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from vqbet_edge import EdgePolicy

HOUR = 3600 * 10**9


def stands(simulator: Simulator, seconds: float = 0.5) -> None:
    """No command comes, whatever is published."""
    before = len(simulator.commands)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        simulator.show(observations(1)[0])
        time.sleep(0.03)
    assert len(simulator.commands) == before


@pytest.mark.parametrize("robot", [{"max_age": 0.3, "max_skew": 1.0}], indirect=True)
def test_the_camera_stops(robot: Robot) -> None:
    """Joint states go on, and there is no command after `max_age`."""
    simulator, [observation] = robot.simulator, observations(1)
    simulator.act(observation)
    last = time.monotonic()
    simulator.show(observation)
    joints = joint_message(observation[STATE])
    arrived: list[float] = []
    count = len(simulator.commands)
    while time.monotonic() < last + 1.5:
        simulator.publish(joints=joints)
        time.sleep(0.02)
        if len(simulator.commands) > count:
            arrived.append(time.monotonic())
            count = len(simulator.commands)
    assert arrived, "commands went on while the frame was young"
    assert arrived[-1] - last < 1.0
    before = len(simulator.commands)
    wait(lambda: "'/camera': the newest message is" in simulator.said()[0])
    assert len(simulator.commands) == before
    assert int(simulator.said()[1]["stale"]) > 0
    assert float(simulator.said()[1]["age_ms_max"]) < 1000


def bad_messages() -> dict[str, Callable[[Simulator], None]]:
    """Name -> what publishes it."""
    [observation] = observations(1, seed=9)
    state = observation[STATE]

    def publish(
        simulator: Simulator, image: Any = None, joints: Any = None, ahead: int = 0
    ) -> None:
        image = image_message(observation[IMAGE]) if image is None else image
        joints = joint_message(state) if joints is None else joints
        simulator.publish(image, joints, simulator.now() + ahead)

    nan = JointState(name=["x", "y"], position=[1.0, float("nan")])
    wide = image_message(np.zeros((SIZE, SIZE + 1, 3), np.uint8))
    depth = image_message(observation[IMAGE])
    depth.encoding = "16UC1"
    cut = image_message(observation[IMAGE])
    cut.data = cut.data[:-10]
    return {
        "finite positions": lambda s: publish(s, joints=nan),
        "without ['y']": lambda s: publish(s, joints=joint_message(state, ("x", "z"))),
        "x24 pixels, got 25x24": lambda s: publish(s, image=wide),
        "got '16UC1'": lambda s: publish(s, image=depth),
        "damaged frames": lambda s: publish(s, image=cut),
        "s in the future": lambda s: publish(s, ahead=HOUR),
        "3600.0": lambda s: publish(s, ahead=-HOUR),
    }


@pytest.mark.parametrize("robot", [{"max_age": 0.3, "timeout": 0.2}], indirect=True)
@pytest.mark.parametrize("names", [list(bad_messages())])
def test_what_does_not_fit_is_not_acted_on(robot: Robot, names: list[str]) -> None:
    """NaN or missing joints, other images, stamps an hour off: no command, and the reason is said."""
    simulator = robot.simulator
    for said in names:
        simulator.act(observations(1)[0])
        time.sleep(0.5)  # what was good is used up, and too old
        before = len(simulator.commands)
        publish = bad_messages()[said]
        end = time.monotonic() + 20
        while said not in simulator.said()[0]:
            assert time.monotonic() < end, f"{said!r} is not in {simulator.said()[0]!r}"
            publish(simulator)
            time.sleep(0.03)
        assert len(simulator.commands) == before, said
    simulator.act(observations(1)[0])


@pytest.mark.parametrize("robot", [{"max_age": 2.0}], indirect=True)
def test_a_restarted_camera(robot: Robot) -> None:
    """After the gap the policy begins a new episode, to the bit."""
    simulator, seen = robot.simulator, observations(9, seed=2)
    sent = [list(simulator.act(observation).data) for observation in seen[:4]]
    simulator.node.destroy_publisher(simulator.images)
    wait(lambda: "stale" in simulator.said()[1])
    simulator.images = simulator.node.create_publisher(Image, "/camera", 1)
    wait(simulator.images.get_subscription_count)
    sent += [list(simulator.act(observation).data) for observation in seen[4:]]
    with EdgePolicy.load(BUNDLE, "onnxruntime", seed=7) as policy:
        expected = [policy.act(each).tolist() for each in seen[:4]]
        policy.reset()
        expected += [policy.act(each).tolist() for each in seen[4:]]
    assert sent == expected


@pytest.mark.parametrize("robot", [{"max_age": 0.3, "resume_within": 0.0}], indirect=True)
def test_after_a_long_stop_somebody_has_to_say_so(robot: Robot) -> None:
    simulator, [observation] = robot.simulator, observations(1)
    simulator.act(observation)
    wait(lambda: "until ~/enable" in simulator.said()[0])
    stands(simulator)
    assert simulator.enable(True).success
    simulator.act(observation)
    assert simulator.enable(False).success
    stands(simulator)
    assert simulator.enable(True).success
    assert simulator.reset().success
    simulator.act(observation)


SOON = {"resume_within": 3.0, "timeout": 0.3}


@pytest.mark.parametrize("robot", [SOON], indirect=True)
def test_a_camera_that_is_plugged_in_later_starts_nobody(robot: Robot) -> None:
    simulator = robot.simulator
    wait(lambda: "until ~/enable" in simulator.said()[0])
    assert "no message came" in simulator.said()[0]
    stands(simulator)
    assert simulator.enable(True).success
    simulator.act(observations(1)[0])


LIMITED = {
    "guards.max_change": [0.01, 0.02], "guards.action_limits": "none",
    "command.when_stopped": "hold",
}  # fmt: skip


@pytest.mark.parametrize("robot", [LIMITED], indirect=True)
def test_no_episode_begins_with_a_jump(robot: Robot) -> None:
    """From where the joints were measured, after activation, a reset and a stop."""
    simulator, first = robot.simulator, []
    for observation in observations(3):
        first.append(np.array(simulator.act(observation).data) - observation[STATE])
        assert simulator.reset().success
        assert simulator.enable(False).success
        assert simulator.enable(True).success
    assert (np.abs(first) <= np.array([0.01, 0.02]) * 1.001).all(), first
    wait(lambda: int(simulator.said()[1]["guards.slowed"]))


@pytest.mark.parametrize("robot", [{"command.when_stopped": "zero"}], indirect=True)
def test_who_waits_says_nothing_however_often_it_is_told_to(robot: Robot) -> None:
    simulator = robot.simulator
    wait(lambda: simulator.commands)
    simulator.answer(lambda: simulator.show(observations(1)[0]))
    assert simulator.enable(False).success
    wait(lambda: list(simulator.commands[-1].data) == [0, 0])
    time.sleep(0.2)
    before = len(simulator.commands)
    assert simulator.enable(False).success
    stands(simulator)
    assert len(simulator.commands) == before


@pytest.mark.parametrize("robot", [{"max_repeats": 2, "max_skew": 5.0}], indirect=True)
def test_a_slow_camera_is_counted_and_then_refused(robot: Robot) -> None:
    """One frame, and joints that are new at every step."""
    simulator, seen = robot.simulator, observations(2)
    for observation in seen:
        simulator.act(observation)
        before = len(simulator.commands)
        joints = joint_message(observation[STATE])
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            simulator.publish(joints=joints)
            time.sleep(0.02)
        # The message with the frame's own joints may have come after it, and be one of the two.
        assert 1 <= len(simulator.commands) - before <= 2
    wait(lambda: int(simulator.said()[1].get("again /camera", 0)) == 4)
    assert int(simulator.said()[1]["repeated"]) > 0


@pytest.mark.parametrize("topic", ["/camera", "/joints", "/commands"])
@pytest.mark.parametrize("robot", [{"command.when_stopped": "silence"}], indirect=True)
def test_two_publishers(robot: Robot, topic: str) -> None:
    """Two cameras on one topic would be mixed, and two policies would fight for the arm."""
    simulator, [observation] = robot.simulator, observations(1)
    simulator.act(observation)
    kinds = {"/camera": Image, "/joints": JointState, "/commands": Float64MultiArray}
    other = simulator.node.create_publisher(kinds[topic], topic, 1)
    wait(lambda: f"'{topic}' has 2 publishers" in simulator.said()[0])
    stands(simulator)
    simulator.node.destroy_publisher(other)
    stands(simulator)
    assert simulator.enable(True).success
    simulator.act(observation)


REMAPPED = {"remap": ["/camera:=/cam0"], "cameras.topics": ["/camera"]}


@pytest.mark.parametrize("robot", [REMAPPED], indirect=True)
def test_two_publishers_of_a_remapped_topic(robot: Robot) -> None:
    simulator, [observation] = robot.simulator, observations(1)
    simulator.act(observation)
    simulator.node.create_publisher(Image, "/cam0", 1)
    wait(lambda: "'/camera' has 2 publishers" in simulator.said()[0])
    stands(simulator)


TELEOP = {"teleop.topic": "/teleop", "teleop.timeout": 0.3}
RESUME = TELEOP | {"teleop.after": "resume"}


@pytest.mark.parametrize("robot", [TELEOP, RESUME], indirect=True, ids=["wait", "resume"])
def test_an_operator_takes_over_and_gives_back(
    robot: Robot, request: pytest.FixtureRequest
) -> None:
    simulator, seen = robot.simulator, observations(6, seed=3)
    hand = simulator.node.create_publisher(Float64MultiArray, "/teleop", 1)
    wait(hand.get_subscription_count)
    sent = [list(simulator.act(observation).data) for observation in seen[:3]]
    before = len(simulator.commands)
    hand.publish(Float64MultiArray(data=[float("nan"), 0.0]))
    hand.publish(Float64MultiArray(data=[1.0]))
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        hand.publish(Float64MultiArray(data=[70.0, 80.0]))
        simulator.show(seen[3])
        time.sleep(0.02)
    taken = [list(each.data) for each in simulator.commands[before:]]
    assert len(taken) > 10
    # Until the first message came, the policy may have acted.
    first = taken.index([70.0, 80.0])
    assert first <= 1
    assert all(each == [70.0, 80.0] for each in taken[first:])
    wait(lambda: "teleoperated" not in simulator.said()[0])
    if "wait" in request.node.name:
        assert "until ~/enable is called: the operator has given back" in simulator.said()[0]
        stands(simulator)
        assert simulator.enable(True).success
    sent.append(list(simulator.act(seen[4]).data))
    assert sent[-1] != [70.0, 80.0]


HELD = {"before": slow_call(4), "timeout": 0.3, "command.when_stopped": "hold", "max_skew": 0.01}


@pytest.mark.parametrize("robot", [HELD], indirect=True)
def test_a_policy_that_is_late(robot: Robot) -> None:
    """The last command is held meanwhile, and what the policy says too late is not sent."""
    simulator, seen = robot.simulator, observations(5, seed=4)
    held = []
    for observation in seen[:3]:
        before = len(simulator.commands)
        simulator.show(observation)
        held = list(wait(lambda before=before: simulator.commands[before:])[-1].data)
    simulator.show(seen[3])
    robot.process.wait_for("predicting")
    wait(lambda: "the policy is late" in simulator.said()[0])
    before = len(simulator.commands)
    wait(lambda: int(simulator.said()[1].get("overtaken", 0)))
    wait(lambda: len(simulator.commands) > before + 10)
    assert {tuple(each.data) for each in simulator.commands[before:]} == {tuple(held)}
