"""Running episodes in vectorised environments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from vqbet_edge.cli import keeping_signals
from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.evaluation.actors import Actor
from vqbet_edge.training.evaluation.tasks import Environment


@dataclass(frozen=True)
class Episode:
    """How one episode went.

    Attributes:
        seed: of the environment and of the policy's sampling.
        success: whether it was solved at any step.
        max_reward: the highest reward of any step.
        states: float32 (T, S), the robot's state at every step.
    """

    seed: int
    success: bool
    max_reward: float
    states: npt.NDArray[np.float32]

    @property
    def steps(self) -> int:
        """How many steps it took."""
        return len(self.states)


class _Running(NamedTuple):
    """An episode while it goes on."""

    seed: int
    states: list[npt.NDArray[np.float32]]
    rewards: list[float]
    successes: list[bool]

    def ended(self) -> Episode:
        states, best = np.stack(self.states), max(self.rewards)
        return Episode(self.seed, any(self.successes), best, states)


def run_episodes(
    make: Callable[[], Environment],
    actor: Actor,
    seeds: Sequence[int],
    *,
    slots: int,
    processes: bool = False,
    on_end: Callable[[Episode], None] = lambda _: None,
) -> list[Episode]:
    """Run one episode per seed.

    Args:
        make: creates one environment.
        actor: with as many slots as there are environments.
        seeds: of the episodes.
        slots: environments that run at the same time.
        processes: give every environment a process of its own.
        on_end: called with every episode that has ended.

    Returns:
        The episodes in the order of their seeds.

    Raises:
        VQBeTEdgeError: an environment's process ended by itself.
        UsageError: the environment does not say whether an episode was solved.
    """
    vector = AsyncVectorEnv if processes else SyncVectorEnv
    envs = vector([make] * slots, autoreset_mode=AutoresetMode.DISABLED)
    waiting = (_Running(seed, [], [], []) for seed in seeds)
    ended: dict[int, Episode] = {}
    # A simulator that draws in this process would swallow an interrupt.
    nothing: list[KeyboardInterrupt] = []
    try:
        with nullcontext(nothing) if processes else keeping_signals() as received:
            for episode in _episodes(envs, actor, waiting, slots, received):
                ended[episode.seed] = episode
                on_end(episode)
    except (EOFError, ConnectionError) as error:
        # gymnasium's `close` would wait for an answer from the process that is gone.
        envs.closed = True
        for process in getattr(envs, "processes", ()):
            process.terminate()
        raise VQBeTEdgeError(
            f"the process of an environment ended by itself ({type(error).__name__}); run fewer "
            "with --num-envs, or without --processes to see why"
        ) from error
    finally:
        envs.close()
    return [ended[seed] for seed in seeds]


def _episodes(
    envs: VectorEnv[Any, Any, Any],
    actor: Actor,
    waiting: Iterator[_Running],
    slots: int,
    received: list[KeyboardInterrupt],
) -> Iterator[Episode]:
    """Step all environments together until nothing waits and none is in an episode."""
    # A slot without work steps along, and nobody looks at what it records.
    idle = _Running(0, [], [], [])
    running = [idle] * slots
    free = np.ones(slots, bool)
    while True:
        if free.any():
            for slot in np.flatnonzero(free).tolist():
                running[slot] = next(waiting, idle)
                actor.reset(slot, running[slot].seed)
            if all(one is idle for one in running):
                return
            seeds: Any = [one.seed for one in running]
            observations, _ = envs.reset(seed=seeds, options={"reset_mask": free.copy()})
        for one, state in zip(running, observations[STATE_KEY], strict=True):
            one.states.append(state.copy())
        actions = actor.act(observations)
        observations, rewards, terminated, truncated, info = envs.step(actions)
        if received:
            raise received[0]
        successes = info.get("is_success")
        if successes is None and (terminated | truncated).any():
            raise UsageError(
                "the environment does not say whether an episode was solved: its step() has to "
                f"return info['is_success'], and returned {', '.join(info) or 'nothing'} at the end"
            )
        free = terminated | truncated
        for slot, one in enumerate(running):
            one.rewards.append(float(rewards[slot]))
            one.successes.append(successes is not None and bool(successes[slot]))
            if free[slot] and one is not idle:
                yield one.ended()
