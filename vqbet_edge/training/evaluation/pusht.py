"""PushT: push a T-shaped block onto its target (gym-pusht)."""

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

IMAGE_SIZE = 96


def contact_state(pose: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """State in which where the pusher touches the block is a smooth function.

    In the pose, equal positions differ by whole turns of the angle, and the place of contact is
    a product with its sine and cosine: a small network spends most of its training on that.

    Args:
        pose: (..., 5), the pusher's x, y and the block's x, y in pixels, the block's angle in
            radians.

    Returns:
        (..., 8): the four positions, cosine and sine of the angle, and the pusher's x, y in the
        block's frame, in pixels.
    """
    cosine, sine = np.cos(pose[..., 4]), np.sin(pose[..., 4])
    x, y = np.moveaxis(pose[..., :2] - pose[..., 2:4], -1, 0)
    seen_from_block = (cosine, sine, cosine * x + sine * y, cosine * y - sine * x)
    return np.concatenate([pose[..., :4], np.stack(seen_from_block, axis=-1)], axis=-1)


class PushT(gymnasium.Env[dict[str, Any], Any]):
    """`gym_pusht/PushT-v0` under the policy's keys.

    State and action are positions of the pusher in pixels of the 512x512 board; the reward is the
    covered share of the target over 0.95, at most 1.
    """

    def __init__(self) -> None:
        import gym_pusht  # noqa: F401, PLC0415 - an optional package, registers itself

        self._env = gymnasium.make(
            "gym_pusht/PushT-v0",
            obs_type="pixels_agent_pos",
            observation_width=IMAGE_SIZE,
            observation_height=IMAGE_SIZE,
        )
        self.action_space = self._env.action_space
        self.observation_space = spaces.Dict(
            {
                "observation.image": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
                "observation.state": spaces.Box(-np.inf, np.inf, (self._state_dim(),), np.float32),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode."""
        observation, info = self._env.reset(seed=seed, options=options)
        return self._renamed(observation), info

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Move the pusher towards `action`."""
        observation, reward, terminated, truncated, info = self._env.step(action)
        return self._renamed(observation), float(reward), terminated, truncated, info

    def close(self) -> None:
        """Free the environment."""
        self._env.close()

    @property
    def simulator(self) -> Any:  # noqa: ANN401
        """gym-pusht's own environment, with the pymunk bodies `agent` and `block`."""
        return self._env.unwrapped

    def _renamed(self, observation: dict[str, Any]) -> dict[str, Any]:
        state = np.asarray(self._state(observation), np.float32)
        return {"observation.image": observation["pixels"], "observation.state": state}

    def _state(self, observation: dict[str, Any]) -> Any:  # noqa: ANN401
        return observation["agent_pos"]

    def _state_dim(self) -> int:
        return 2


class PushTWithPose(PushT):
    """PushT whose state is the pusher's x, y and the block's x, y, angle in radians."""

    def _state(self, observation: dict[str, Any]) -> Any:  # noqa: ANN401
        block = self.simulator.block
        return [*observation["agent_pos"], *block.position, block.angle]

    def _state_dim(self) -> int:
        return 5


class PushTWithContact(PushTWithPose):
    """PushT whose state is `contact_state` of the pose."""

    def _state(self, observation: dict[str, Any]) -> Any:  # noqa: ANN401
        return contact_state(np.asarray(super()._state(observation), np.float32))

    def _state_dim(self) -> int:
        return 8
