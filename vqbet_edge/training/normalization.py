"""From stored statistics to affine scaling, as LeRobot normalises.

Sources: `Normalize` and `Unnormalize` of LeRobot up to 0.3.3, `_NormalizationMixin` from 0.4 on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqbet_edge.errors import CheckpointError
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.config import NormalizationMode, VQBeTConfig
from vqbet_edge.training.dataset import LeRobotDataset

Floats = NDArray[np.float32]
Statistics = Mapping[str, Floats]  # by name: min, max, mean, std


Scaling = Affine


@dataclass(frozen=True)
class Epsilon:
    """How an era of LeRobot keeps a constant feature from dividing by zero.

    Attributes:
        value: the small number.
        always: added to every range (up to 0.3) instead of replacing a range of zero (from 0.4).
    """

    value: float
    always: bool

    def range(self, low: Floats, high: Floats) -> Floats:
        """The range that values are divided by."""
        span, value = high - low, np.float32(self.value)
        result: Floats = span + value if self.always else np.where(span == 0, value, span)
        return result


def identity(dim: int) -> Scaling:
    """Scaling that changes nothing."""
    zeros, ones = np.zeros(dim, np.float32), np.ones(dim, np.float32)
    return Scaling(zeros, ones, zeros)


def normalizing(mode: NormalizationMode, stats: Statistics, epsilon: Epsilon) -> Scaling:
    """Units of the robot -> units of the network."""
    match mode:
        case NormalizationMode.MIN_MAX:
            low, high = stats["min"], stats["max"]
            scale = np.float32(2) / epsilon.range(low, high)
            return Scaling(low, scale, np.full_like(low, -1))
        case NormalizationMode.MEAN_STD:
            mean, std = stats["mean"], stats["std"]
            scale = np.float32(1) / (std + np.float32(epsilon.value))
            return Scaling(mean, scale, np.zeros_like(mean))
        case NormalizationMode.IDENTITY:
            raise AssertionError("an identity has no statistics")


def unnormalizing(mode: NormalizationMode, stats: Statistics, epsilon: Epsilon) -> Scaling:
    """Units of the network -> units of the robot."""
    match mode:
        case NormalizationMode.MIN_MAX:
            low, high = stats["min"], stats["max"]
            # Only from 0.4 on does the inverse use the guarded range.
            span = high - low if epsilon.always else epsilon.range(low, high)
            return Scaling(np.full_like(low, -1), span / np.float32(2), low)
        case NormalizationMode.MEAN_STD:
            mean, std = stats["mean"], stats["std"]
            return Scaling(np.zeros_like(mean), std, mean)
        case NormalizationMode.IDENTITY:
            raise AssertionError("an identity has no statistics")


def required_statistics(
    key: str, mode: NormalizationMode, stored: Statistics, dim: int
) -> Statistics:
    """The statistics that a mode needs, flattened to (dim,) and checked.

    Raises:
        CheckpointError: one is missing, not finite, or of another width than the feature.
    """
    names = ("min", "max") if mode is NormalizationMode.MIN_MAX else ("mean", "std")
    found = {}
    for name in names:
        if name not in stored:
            raise CheckpointError(
                f"'{key}' is normalised by {mode.value}, but the checkpoint has no '{name}' of it "
                f"(found: {sorted(stored) or 'nothing'}); save the policy again with its data "
                "set's statistics"
            )
        value = np.asarray(stored[name], np.float32).reshape(-1)
        if value.size != dim or not np.isfinite(value).all():
            raise CheckpointError(
                f"'{key}': expected {dim} finite values of '{name}', got shape "
                f"{np.shape(stored[name])}; save the policy again with its data set's statistics"
            )
        found[name] = value
    return found


# LeRobot's processors replace a range of zero by this.
EPSILON = Epsilon(1e-8, always=False)


@dataclass(frozen=True)
class Scalings:
    """Per feature: robot units -> network units, and back."""

    forward: Mapping[str, Scaling]
    backward: Mapping[str, Scaling]

    @classmethod
    def of(cls, dataset: LeRobotDataset, config: VQBeTConfig) -> "Scalings":
        """What the configuration's `normalization_mapping` makes of the data set's statistics.

        Raises:
            CheckpointError: the data set lacks a statistic that a mode needs.
        """
        forward, backward = {}, {}
        for key, feature in {**config.input_features, **config.output_features}.items():
            dim = feature.shape[0]
            mode = config.normalization_mapping[feature.type.value]
            if mode is NormalizationMode.IDENTITY:
                forward[key] = backward[key] = identity(dim)
            else:
                stats = required_statistics(key, mode, dataset.stats.get(key, {}), dim)
                forward[key] = normalizing(mode, stats, EPSILON)
                backward[key] = unnormalizing(mode, stats, EPSILON)
        return cls(forward, backward)

    def normalize(self, key: str, values: npt.NDArray[np.float32]) -> Tensor:
        """(..., dim) in the robot's units -> float32 (..., dim) in the network's."""
        return torch.from_numpy(_apply(self.forward[key], values))

    def unit(self, key: str) -> npt.NDArray[np.float32]:
        """float32 (dim,): how much of the robot's unit one of the network's is."""
        return self.backward[key].multiply


def _apply(scaling: Scaling, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return (values - scaling.subtract) * scaling.multiply + scaling.add
