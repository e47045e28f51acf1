"""Meta-World's push-v3: a simulated arm pushes a puck to a goal, seen by one camera."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from vqbet_edge.errors import UsageError

# MuJoCo chooses its renderer when it is imported; a software EGL needs no display.
os.environ.setdefault("MUJOCO_GL", "egl")

IMAGE_SIZE = 96
MAX_STEPS = 150


@contextmanager
def _explaining_renderer() -> Iterator[None]:
    """What MuJoCo's loader of OpenGL raises, as it comes: attributes of None and worse."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise UsageError(
            f"MuJoCo cannot draw with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}; install its "
            "library (egl: sudo apt install libegl1 libgl1-mesa-dri; osmesa: sudo apt install "
            "libosmesa6), or choose the other one: MUJOCO_GL=osmesa vqbet-eval ..."
        ) from error


def _import_mujoco() -> ModuleType:
    with _explaining_renderer():
        import mujoco  # noqa: PLC0415 - an optional package
    module: ModuleType = mujoco
    return module


class MetaWorldPush(gymnasium.Env[dict[str, Any], Any]):
    """push-v3 with random puck and goal, which only the image shows.

    State: the hand's x, y, z (metres) and the gripper's opening. Action: displacement of the hand
    and the gripper, each in [-1, 1].
    """

    def __init__(self) -> None:
        mujoco = _import_mujoco()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: PLC0415

        self._env = ALL_V3_ENVIRONMENTS["push-v3"]()
        self._env._set_task_called = True  # noqa: SLF001 - its tasks would fix puck and goal
        self._env._freeze_rand_vec = False  # noqa: SLF001
        self._env.seeded_rand_vec = True
        # Twice as fast in software, and what the demonstrations were seen with.
        self._env.model.vis.quality.offsamples = 0
        with _explaining_renderer():
            self._renderer = mujoco.Renderer(self._env.model, IMAGE_SIZE, IMAGE_SIZE)
        flags = mujoco.mjtRndFlag
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX,
                     flags.mjRND_HAZE):  # fmt: skip
            self._renderer.scene.flags[flag] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.lookat[:] = 0, 0.68, 0.08
        self._camera.distance, self._camera.azimuth, self._camera.elevation = 0.75, 270, -50
        self.action_space = spaces.Box(-1, 1, (4,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "observation.image": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
                "observation.state": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            }
        )
        self._forward = mujoco.mj_forward
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.seed(seed)
        state, _ = self._env.reset(options=options)
        # Otherwise the first image shows the goal of the episode before.
        self._forward(self._env.model, self._env.data)
        self._steps = 0
        return self._observation(state), {"is_success": False}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:  # noqa: ANN401
        """Move the hand; the episode ends with success or after 150 steps."""
        clipped = np.clip(np.asarray(action, np.float32), -1, 1)
        state, reward, _, _, info = self._env.step(clipped)
        self._steps += 1
        success = bool(info["success"])
        observation = self._observation(state)
        # Meta-World's reward goes from 0 to 10.
        return observation, reward / 10, success, self._steps >= MAX_STEPS, {"is_success": success}

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()
        self._env.close()  # type: ignore[no-untyped-call]

    def _observation(self, state: npt.NDArray[np.float64]) -> dict[str, Any]:
        self._renderer.update_scene(self._env.data, self._camera)
        return {
            "observation.image": self._renderer.render(),
            "observation.state": state[:4].astype(np.float32),
        }
