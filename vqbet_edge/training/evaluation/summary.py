"""Figures of an evaluation, with what chance has to do with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqbet_edge.training.evaluation.rollout import Episode

# Two-sided 95 % of the normal distribution.
Z = 1.959964
BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Summary:
    """What the episodes of one policy amount to."""

    episodes: int
    success: Estimate
    max_reward: Estimate
    mean_steps: float


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same seeds.

    Attributes:
        success: of the second minus the first.
        max_reward: of the second minus the first.
        only_first, only_second: seeds that only this one solved.
    """

    success: Estimate
    max_reward: Estimate
    only_first: int
    only_second: int


def summarize(episodes: Sequence[Episode]) -> Summary:
    """Success rate with Wilson's interval, mean maximum reward with a bootstrap interval."""
    return Summary(
        episodes=len(episodes),
        success=wilson(sum(e.success for e in episodes), len(episodes)),
        max_reward=bootstrap([e.max_reward for e in episodes]),
        mean_steps=float(np.mean([e.steps for e in episodes])),
    )


def compare(first: Sequence[Episode], second: Sequence[Episode]) -> Comparison:
    """Paired differences: the seeds are the same, so their luck cancels."""
    pairs = list(zip(first, second, strict=True))
    return Comparison(
        success=bootstrap([float(b.success) - float(a.success) for a, b in pairs]),
        max_reward=bootstrap([b.max_reward - a.max_reward for a, b in pairs]),
        only_first=sum(a.success and not b.success for a, b in pairs),
        only_second=sum(b.success and not a.success for a, b in pairs),
    )


def wilson(successes: int, trials: int) -> Estimate:
    """Wilson's score interval ("Probable inference", 1927): right also near 0 and 1."""
    share = successes / trials
    spread = 1 + Z**2 / trials
    middle = (share + Z**2 / (2 * trials)) / spread
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2)) / spread
    # Rounding must not put the share itself outside.
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def bootstrap(values: Sequence[float]) -> Estimate:
    """Percentile bootstrap of the mean, repeatable."""
    array = np.asarray(values)
    draws = np.random.default_rng(0).integers(0, len(array), (BOOTSTRAPS, len(array)))
    low, high = np.percentile(array[draws].mean(1), [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high))
