"""PushT: push a T-shaped block onto its target (gym-pusht)."""

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

IMAGE_SIZE = 96
BOARD = 512.0  # side, in pixels of positions


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


def mirror_points(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Positions seen in the target's axis of symmetry, in which the task is the same.

    Args:
        points: (..., 2), x and y on the board in pixels.
    """
    return BOARD - points[..., ::-1]


def mirror_frames(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pictures of the board (..., H, H, 3) seen in the same axis; see `mirror_points`."""
    return np.flip(frames, (-3, -2)).swapaxes(-3, -2)


class PushT(gymnasium.ObservationWrapper[dict[str, Any], Any, dict[str, Any]]):
    """`gym_pusht/PushT-v0` under the policy's keys.

    State and action are positions of the pusher in pixels of the 512x512 board; the reward is the
    covered share of the target over 0.95, at most 1.
    """

    state_dim = 2

    def __init__(self) -> None:
        import gym_pusht  # noqa: F401, PLC0415 - an optional package, registers itself

        env = gymnasium.make(
            "gym_pusht/PushT-v0",
            obs_type="pixels_agent_pos",
            observation_width=IMAGE_SIZE,
            observation_height=IMAGE_SIZE,
        )
        super().__init__(env)
        self.observation_space = spaces.Dict(
            {
                "observation.image": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
                "observation.state": spaces.Box(-np.inf, np.inf, (self.state_dim,), np.float32),
            }
        )

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """From gym-pusht's keys to the policy's."""
        state = np.asarray(self.state(observation["agent_pos"]), np.float32)
        return {"observation.image": observation["pixels"], "observation.state": state}

    def state(self, pusher: Any) -> Any:  # noqa: ANN401
        """`observation.state` for the pusher's x, y."""
        return pusher


class PushTWithPose(PushT):
    """PushT whose state is the pusher's x, y and the block's x, y, angle in radians."""

    state_dim = 5

    def state(self, pusher: Any) -> Any:  # noqa: ANN401
        """See `PushT`."""
        block = self.unwrapped.block  # type: ignore[attr-defined] # gym-pusht's pymunk body
        return [*pusher, *block.position, block.angle]


class PushTWithContact(PushTWithPose):
    """PushT whose state is `contact_state` of the pose."""

    state_dim = 8

    def state(self, pusher: Any) -> Any:  # noqa: ANN401
        """See `PushT`."""
        return contact_state(np.asarray(super().state(pusher), np.float32))
