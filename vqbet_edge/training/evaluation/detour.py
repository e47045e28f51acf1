"""A point robot, a bar in its way, and a goal behind it.

y 0  +-----------------+     The robot starts at the top, the goal is at the bottom, the bar
     |        o        |     lies between. Bar and goal are seen in the image only. The bar can
     |     =======     |     be passed on the left or on the right; halfway between the two it
     |          x      |     is hit.
y 1  +-----------------+
    x 0               x 1
"""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

Vector = npt.NDArray[np.float64]

IMAGE_SIZE = 64
MAX_STEPS = 60
MAX_STEP = 0.06
ROBOT_RADIUS = 0.025
GOAL_RADIUS = 0.06
_BAR, _GOAL, _ROBOT = np.array([[45, 45, 50], [50, 160, 70], [40, 80, 200]], np.float64)
# float64 (2, H, W): x and y of the pixels' centres.
_PIXELS = np.stack(np.meshgrid(*[(np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE] * 2))


@dataclass(frozen=True)
class Scene:
    """What differs between episodes, all in units of the square."""

    start: Vector
    goal: Vector
    bar: Vector
    half_size: Vector

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Scene":
        """A scene at random."""
        return cls(
            start=rng.uniform((0.48, 0.06), (0.52, 0.10)),
            goal=rng.uniform((0.38, 0.88), (0.62, 0.92)),
            bar=rng.uniform((0.47, 0.44), (0.53, 0.54)),
            half_size=rng.uniform((0.14, 0.03), (0.19, 0.05)),
        )

    @classmethod
    def of(cls, seed: int) -> "Scene":
        """The one that an environment of this `scene_seed` has."""
        return cls.draw(np.random.default_rng(seed))

    def hits(self, position: Vector) -> bool:
        """Whether a robot at `position` touches the bar."""
        outside = np.maximum(np.abs(position - self.bar) - self.half_size, 0)
        return bool(np.hypot(*outside) < ROBOT_RADIUS)

    def render(self, position: Vector) -> npt.NDArray[np.uint8]:
        """uint8 (64, 64, 3), edges smooth so that less than a pixel can be told."""
        image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 255.0)
        beyond = np.abs(_PIXELS - self.bar[:, None, None]) - self.half_size[:, None, None]
        _paint(image, -np.maximum(*beyond), _BAR)
        _paint(image, GOAL_RADIUS - np.hypot(*(_PIXELS - self.goal[:, None, None])), _GOAL)
        _paint(image, ROBOT_RADIUS - np.hypot(*(_PIXELS - position[:, None, None])), _ROBOT)
        return image.round().astype(np.uint8)


def _paint(image: Vector, depth: Vector, color: Vector) -> None:
    """Paint where `depth` (H, W), the distance into a shape, is positive."""
    cover = (depth * IMAGE_SIZE + 0.5).clip(0, 1)
    rows, columns = cover.nonzero()
    part = image[rows, columns]
    image[rows, columns] = part + cover[rows, columns, None] * (color - part)


class DetourEnv(gymnasium.Env[dict[str, Any], Any]):
    """The task as a gymnasium environment.

    `observation.state` is the robot's position; the action is its displacement, shortened to 0.06;
    the reward is 1 at the goal, and touching the bar ends the episode.
    """

    def __init__(self, scene_seed: int | None = None) -> None:
        """With a `scene_seed` every episode has the same scene."""
        self._scene_seed = scene_seed
        self.action_space = spaces.Box(-MAX_STEP, MAX_STEP, (2,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "observation.image": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
                "observation.state": spaces.Box(0, 1, (2,), np.float32),
            }
        )
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a scene."""
        super().reset(seed=seed if self._scene_seed is None else self._scene_seed, options=options)
        self.scene = Scene.draw(self.np_random)
        self.position, self._steps = self.scene.start, 0
        return self._observation(), {"is_success": False}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Move the robot."""
        move = np.asarray(action, np.float64)
        move = move * min(1.0, MAX_STEP / max(float(np.hypot(*move)), 1e-9))
        # Halfway too: the bar is not to be jumped over.
        crashed = self.scene.hits(self.position + move / 2) or self.scene.hits(self.position + move)
        self.position = (self.position + move).clip(0, 1)
        self._steps += 1
        reached = bool(np.hypot(*(self.position - self.scene.goal)) < GOAL_RADIUS) and not crashed
        truncated = self._steps >= MAX_STEPS
        info = {"is_success": reached, "crashed": crashed}
        return self._observation(), float(reached), reached or crashed, truncated, info

    def _observation(self) -> dict[str, Any]:
        return {
            "observation.image": self.scene.render(self.position),
            "observation.state": self.position.astype(np.float32),
        }
