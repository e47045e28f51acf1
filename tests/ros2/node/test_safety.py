"""Two processes: what goes wrong on one side, and that the robot stands still."""

import time
from typing import Any

import pytest
from robots import Robot, image_message, joint_message, observations, slow_call, wait
from sensor_msgs.msg import Image
from std_msgs.msg import Float64MultiArray

HOUR = 3600 * 10**9


@pytest.mark.parametrize("robot", [{"max_age": 0.3, "resume_within": 0.0}], indirect=True)
def test_the_camera_stops(robot: Robot) -> None:
    """Joint states go on, and there is no command after `max_age`, until somebody says so."""
    simulator, [observation] = robot.simulator, observations(1)
    simulator.act(observation)
    last, arrived = time.monotonic(), []
    while "'/camera': the newest message is" not in simulator.said()[0]:
        count = len(simulator.commands)
        simulator.publish(joints=joint_message(observation["observation.state"]))
        time.sleep(0.02)
        assert time.monotonic() < last + 20
        arrived += [time.monotonic()] * (len(simulator.commands) - count)
    assert not arrived or arrived[-1] - last < 1.0
    assert int(simulator.said()[1]["stale"]) > 0
    assert float(simulator.said()[1]["age_ms_max"]) < 1000
    wait(lambda: "until ~/enable" in simulator.said()[0])
    simulator.stands()
    assert simulator.enable(True).success
    simulator.act(observation)
    assert simulator.enable(False).success
    simulator.stands()
    assert simulator.enable(True).success
    assert simulator.reset().success
    simulator.act(observation)


@pytest.mark.parametrize("robot", [{"max_age": 0.3, "timeout": 0.2}], indirect=True)
def test_what_does_not_fit_is_not_acted_on(robot: Robot) -> None:
    """Joints or a frame, a stamp an hour off: no command, and the reason is said."""
    simulator, [good] = robot.simulator, observations(1)
    frame, joints = (
        image_message(good["observation.image"]),
        joint_message(good["observation.state"]),
    )
    depth = image_message(good["observation.image"])
    depth.encoding = "16UC1"
    wrong: dict[str, tuple[Any, Any, int]] = {
        "without ['y']": (frame, joint_message(good["observation.state"], ("x", "z")), 0),
        "got '16UC1'": (depth, joints, 0),
        "s in the future": (frame, joints, HOUR),
        "3600.0": (frame, joints, -HOUR),
    }
    for said, (image, state, ahead) in wrong.items():
        simulator.act(good)
        wait(lambda: "the newest message is" in simulator.said()[0])
        before, end = len(simulator.commands), time.monotonic() + 20
        while said not in simulator.said()[0]:
            assert time.monotonic() < end, f"{said!r} is not in {simulator.said()[0]!r}"
            simulator.publish(image, state, simulator.now() + ahead)
            time.sleep(0.03)
        assert len(simulator.commands) == before, said
    simulator.act(good)


REMAPPED = {"remap": "/camera:=/cam0"}


@pytest.mark.parametrize(
    ("robot", "topic", "kind"),
    [(REMAPPED, "/cam0", Image), ({}, "/commands", Float64MultiArray)],
    indirect=["robot"],
)
def test_two_publishers(robot: Robot, topic: str, kind: Any) -> None:
    """Two cameras on one topic would be mixed, and two policies would fight for the arm."""
    simulator, [observation] = robot.simulator, observations(1)
    simulator.act(observation)
    other = simulator.node.create_publisher(kind, topic, 1)
    wait(lambda: "has 2 publishers" in simulator.said()[0])
    simulator.stands()
    simulator.node.destroy_publisher(other)
    simulator.stands()
    assert simulator.enable(True).success
    simulator.act(observation)


@pytest.mark.parametrize(
    "robot", [{"teleop.topic": "/teleop", "teleop.timeout": 0.3}], indirect=True
)
def test_an_operator_takes_over_and_gives_back(robot: Robot) -> None:
    simulator, [observation] = robot.simulator, observations(1)
    hand = simulator.node.create_publisher(Float64MultiArray, "/teleop", 1)
    wait(hand.get_subscription_count)
    simulator.act(observation)
    before = len(simulator.commands)
    hand.publish(Float64MultiArray(data=[float("nan"), 0.0]))
    while len(simulator.commands) < before + 10:
        hand.publish(Float64MultiArray(data=[70.0, 80.0]))
        simulator.show(observation)
        time.sleep(0.02)
    taken = [list(each.data) for each in simulator.commands[before:]]
    # Until the first message came, the policy may have acted.
    first = taken.index([70.0, 80.0])
    assert first <= 1
    assert all(each == [70.0, 80.0] for each in taken[first:])
    wait(lambda: "until ~/enable is called: the operator has given" in simulator.said()[0])
    simulator.stands()
    assert simulator.enable(True).success
    assert list(simulator.act(observation).data) != [70.0, 80.0]


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
    wait(lambda: "the policy is late" in robot.process.text())
    before = len(simulator.commands)
    wait(lambda: int(simulator.said()[1].get("overtaken", 0)))
    wait(lambda: len(simulator.commands) > before + 10)
    assert {tuple(each.data) for each in simulator.commands[before:]} == {tuple(held)}
