"""Normalisation of a data set's features, the same as what the robot applies."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqbet_edge.data import LeRobotDataset
from vqbet_edge.model.config import NormalizationMode, VQBeTConfig
from vqbet_edge.model.scaling import (
    Epsilon,
    Scaling,
    identity,
    normalizing,
    required_statistics,
    unnormalizing,
)

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
