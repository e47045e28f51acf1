"""PushT as a robot of LeRobot's: a plugin, installed by the tests as lerobot_robot_pusht_sim.

Joints are the pusher's x and y, in pixels of the board; the camera is called `top`. What it sees and
is told is written to `log` when it is disconnected.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gym_pusht  # noqa: F401 - registers itself
import gymnasium
import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = ("x.pos", "y.pos")


@RobotConfig.register_subclass("pusht_sim")
@dataclass(kw_only=True)
class PushtSimConfig(RobotConfig):
    log: str
    camera_size: int = 96


class PushtSim(Robot):
    config_class = PushtSimConfig
    name = "pusht_sim"

    def __init__(self, config: PushtSimConfig) -> None:
        super().__init__(config)
        self.config = config
        self._env: Any = None
        self._seen: dict[str, list[Any]] = {"frames": [], "states": [], "actions": []}

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        size = self.config.camera_size
        return {**dict.fromkeys(JOINTS, float), "top": (size, size, 3)}

    action_features = dict.fromkeys(JOINTS, float)
    is_connected = property(lambda self: self._env is not None)
    is_calibrated = True

    def calibrate(self) -> None:
        pass

    configure = calibrate

    def connect(self, calibrate: bool = True) -> None:  # noqa: ARG002
        sizes = dict.fromkeys(("observation_width", "observation_height"), self.config.camera_size)
        self._env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", **sizes)
        self._now = self._env.reset(seed=1003)[0]

    def get_observation(self) -> dict[str, Any]:
        position = self._now["agent_pos"].astype(np.float32)
        self._latest = self._now["pixels"], position
        return {**dict(zip(JOINTS, map(float, position), strict=True)), "top": self._now["pixels"]}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        target = np.array([action[joint] for joint in JOINTS], np.float32)
        for name, value in zip(self._seen, (*self._latest, target), strict=True):
            self._seen[name].append(value)
        self._now = self._env.step(target)[0]
        return action

    def disconnect(self) -> None:
        np.savez(self.config.log, **{name: np.array(v) for name, v in self._seen.items()})
        self._env.close()
        self._env = None
