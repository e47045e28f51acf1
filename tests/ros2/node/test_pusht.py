"""The trained PushT policy drives gym-pusht: the simulation here, the node in a process of its own."""

import os
from typing import Any

import numpy as np
import pytest
from robots import IMAGE, PARAMETERS, STATE, Observation, Robot, image_message
from sensor_msgs.msg import JointState

from vqbet_edge import EdgePolicy
from vqbet_edge.training.evaluation.pusht import PushTWithContact

BUNDLE = os.environ["VQBET_EDGE_TEST_PUSHT"]
JOINTS = [f"s{number}" for number in range(PushTWithContact.state_dim)]
PUSHT: dict[str, Any] = {
    "bundle": BUNDLE, "state.joints": JOINTS, "command.joints": ["x", "y"],
    "guards.action_limits": "none",
}  # fmt: skip
# Of its starts, four in five are brought to an end: these on the machine where this was written.
FIRST, EPISODES = 100_003, 3


@pytest.mark.parametrize("robot", [PUSHT], indirect=True)
def test_an_episode_over_ros_is_the_policys_own(robot: Robot) -> None:
    solved = False
    with EdgePolicy.load(BUNDLE, "onnxruntime", seed=PARAMETERS["seed"]) as alone:
        for seed in range(FIRST, FIRST + EPISODES):
            seen, sent, solved = drive(robot, seed)
            assert sent == [alone.act(observation).tolist() for observation in seen]
            if solved:
                break
            robot.simulator.reset()
            alone.reset()
    assert solved


def drive(robot: Robot, seed: int) -> tuple[list[Observation], list[list[float]], bool]:
    """What an episode showed, what was commanded, and whether the block came home."""
    env, seen, sent = PushTWithContact(), [], []
    observation, _ = env.reset(seed=seed)
    while True:
        seen.append(observation)
        image = image_message(observation[IMAGE])
        joints = JointState(name=JOINTS, position=observation[STATE].astype(float).tolist())
        command = robot.simulator.answer(lambda: robot.simulator.publish(image, joints))  # noqa: B023
        sent.append(command.data.tolist())
        observation, _, terminated, truncated, info = env.step(np.array(command.data))
        if terminated or truncated:
            return seen, sent, bool(info["is_success"])
