"""Running episodes in vectorised environments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.evaluation.actors import Actor
from vqbet_edge.training.evaluation.tasks import Environment

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Episode:
    """How one episode went.

    Attributes:
        seed: of the environment and of the policy's sampling.
        success: whether it was solved at any step.
        max_reward: the highest reward of any step.
        states: float32 (T, S), the robot's state at every step.
        frames: uint8 (T, H, W, 3) of the first camera, when asked for.
    """

    seed: int
    success: bool
    max_reward: float
    states: npt.NDArray[np.float32]
    frames: Frames | None = None

    @property
    def steps(self) -> int:
        """How many steps it took."""
        return len(self.states)


class _Slot:
    """One environment of the vector and the episode that it is in."""

    def __init__(self) -> None:
        self.seed: int | None = None

    def begin(self, seed: int, keep_frames: bool) -> None:
        self.seed, self.success, self.max_reward = seed, False, -np.inf
        self.states: list[npt.NDArray[np.float32]] = []
        self.frames: list[Frames] | None = [] if keep_frames else None

    def see(self, frame: Frames, state: npt.NDArray[np.float32]) -> None:
        if self.seed is not None:
            self.states.append(state.copy())
            if self.frames is not None:
                self.frames.append(frame.copy())

    def add(self, reward: float, success: bool) -> None:
        self.max_reward = max(self.max_reward, reward)
        self.success |= success

    def episode(self) -> Episode:
        frames = None if self.frames is None else np.stack(self.frames)
        assert self.seed is not None  # noqa: S101 - only slots in use end an episode
        states = np.stack(self.states)
        return Episode(self.seed, self.success, float(self.max_reward), states, frames)


def run_episodes(
    make: Callable[[], Environment],
    actor: Actor,
    seeds: Sequence[int],
    *,
    slots: int,
    processes: bool = False,
    keep_frames: int = 0,
    on_end: Callable[[Episode], None] = lambda _: None,
) -> list[Episode]:
    """Run one episode per seed.

    Args:
        make: creates one environment.
        actor: with as many slots as there are environments.
        seeds: of the episodes.
        slots: environments that run at the same time.
        processes: give every environment a process of its own.
        keep_frames: of how many episodes to keep the frames.
        on_end: called with every episode that has ended.

    Returns:
        The episodes in the order of their seeds.
    """
    vector = AsyncVectorEnv if processes else SyncVectorEnv
    envs = vector([make] * slots, autoreset_mode=AutoresetMode.DISABLED)
    kept = set(seeds[:keep_frames])
    camera = next(k for k, s in envs.single_observation_space.items() if len(s.shape) == 3)  # type: ignore[attr-defined]
    waiting, places = list(seeds), [_Slot() for _ in range(slots)]
    ended: dict[int, Episode] = {}
    free = np.ones(slots, bool)
    observations: dict[str, npt.NDArray[Any]] = {}
    try:
        while len(ended) < len(seeds):
            if free.any():
                _fill(places, free, waiting, kept, actor)
                # Slots without work are reset too: they step along and nobody looks.
                resets = [place.seed for place in places]
                observations, _ = envs.reset(
                    seed=[s if f else None for s, f in zip(resets, free, strict=True)],
                    options={"reset_mask": free.copy()},
                )
            for slot, place in enumerate(places):
                place.see(observations[camera][slot], observations[STATE_KEY][slot])
            actions = actor.act(observations)
            observations, rewards, terminated, truncated, info = envs.step(actions)
            successes = info.get("is_success", np.zeros(slots, bool))
            free = terminated | truncated
            for slot in np.flatnonzero([place.seed is not None for place in places]).tolist():
                places[slot].add(float(rewards[slot]), bool(successes[slot]))
                if free[slot]:
                    episode = places[slot].episode()
                    ended[episode.seed] = episode
                    on_end(episode)
    finally:
        envs.close()
    return [ended[seed] for seed in seeds]


def _fill(
    places: Sequence[_Slot],
    free: npt.NDArray[np.bool_],
    waiting: list[int],
    kept: set[int],
    actor: Actor,
) -> None:
    for slot in np.flatnonzero(free).tolist():
        if waiting:
            seed = waiting.pop(0)
            places[slot].begin(seed, seed in kept)
        else:
            places[slot].seed = None
        actor.reset(slot, places[slot].seed or 0)
