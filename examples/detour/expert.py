"""Demonstrations of the detour: every scene twice, once on the left and once on the right."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vqbet_edge.training.dataset.writer import Demonstration
from vqbet_edge.training.evaluation.detour import DetourEnv, Scene, Vector

SPEED = 0.045
NOISE = 0.008


def collect(scenes: int, seed: int) -> list[Demonstration]:
    """Record successful demonstrations in so many scenes, two in each."""
    rng, env = np.random.default_rng(seed), DetourEnv()
    found: list[Demonstration] = []
    while len(found) < 2 * scenes:
        scene_seed = int(rng.integers(2**31))
        ways = [_demonstrate(env, scene_seed, side, rng) for side in (-1, 1)]
        both = [way for way in ways if way is not None]
        found += both if len(both) == len(ways) else []
    return found


def _demonstrate(
    env: DetourEnv, scene_seed: int, side: int, rng: np.random.Generator
) -> Demonstration | None:
    """One on the left (-1) or on the right (1) of the bar; None if the noise led into it."""
    observation, _ = env.reset(seed=scene_seed)
    corners = _way(env.scene, side, rng)
    rows: list[dict[str, npt.NDArray[Any]]] = []
    done = success = False
    while not done:
        while len(corners) > 1 and np.hypot(*(corners[0] - env.position)) < SPEED:
            corners.pop(0)
        move = _towards(corners[0] - env.position)
        rows.append({**observation, "action": move.astype(np.float32)})
        # The noise is executed but not the label, so that the data shows how to recover.
        observation, _, crashed, truncated, info = env.step(move + rng.normal(0, NOISE, 2))
        done, success = crashed or truncated, info["is_success"]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]} if success else None


def _way(scene: Scene, side: int, rng: np.random.Generator) -> list[Vector]:
    reach = scene.half_size + rng.uniform(0.08, 0.11)
    near, far = np.array([side, -1]) * reach, np.array([side, 1]) * reach
    return [scene.bar + near, scene.bar + far, scene.goal]


def _towards(way: Vector) -> Vector:
    distance = float(np.hypot(*way))
    return way * min(1.0, SPEED / max(distance, 1e-9))
