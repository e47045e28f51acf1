"""Episodes that a policy drives while it is trained: `vqbet-train --eval-env`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, VQBeTConfig
from vqbet_edge.training.evaluation.actors import Siblings
from vqbet_edge.training.evaluation.rollout import run_episodes
from vqbet_edge.training.evaluation.tasks import Environment, check_task, make_task

# Others than `vqbet-eval` begins with: what is chosen here is judged there.
_FIRST_SEED = 200_000
_SLOTS = 8


class Outcome(NamedTuple):
    """What became of them; a larger one is better."""

    success: float  # share of the episodes
    max_reward: float  # mean of the highest of each
    steps: float  # mean


@dataclass(frozen=True)
class Trials:
    """So many episodes in an environment, always the same ones."""

    make: Callable[[], Environment]
    episodes: int

    @classmethod
    def of(cls, env: str, episodes: int, policy: VQBeTConfig) -> "Trials":
        """After a look whether a policy can be driven there.

        Raises:
            UsageError: the environment is unknown, not installed, or does not fit.
        """
        make = make_task(env)
        sizes = zip(policy.image_keys, policy.image_sizes, strict=True)
        shapes: dict[str, tuple[int, ...]] = {key: (*size, 3) for key, size in sizes}
        shapes[STATE_KEY] = policy.input_features[STATE_KEY].shape
        check_task(env, make, shapes, policy.output_features[ACTION_KEY].shape[0])
        return cls(make, episodes)

    def drive(self, checkpoint: Path) -> Outcome:
        """Drive a checkpoint as `vqbet-eval` does; what is drawn at random outside is not touched.

        Raises:
            KeyboardInterrupt: it was told to stop.
        """
        slots = min(_SLOTS, self.episodes)
        seeds = range(_FIRST_SEED, _FIRST_SEED + self.episodes)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            actor = Siblings(*load_backend(str(checkpoint)), slots)
            ended = run_episodes(self.make, actor, seeds, slots=slots)
        found = [(float(e.success), e.max_reward, float(e.steps)) for e in ended]
        return Outcome(*np.mean(found, axis=0).tolist())
