"""From statistics to affine scaling, as LeRobot normalises.

Sources: `Normalize` and `Unnormalize` of LeRobot up to 0.3.3, `_NormalizationMixin` from 0.4 on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqbet_edge.errors import CheckpointError, DatasetError
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.config import (
    ACTION_KEY,
    STATE_KEY,
    FeatureType,
    NormalizationMode,
    VQBeTConfig,
)
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.dataset import vector_statistics

Floats = NDArray[np.float32]
Statistics = Mapping[str, Floats]  # by name, see `STATISTICS`
Scalar = TypeVar("Scalar", bound=np.generic)

# What a mode needs; all but MEAN_STD map the first to -1 and the second to 1.
STATISTICS = {
    NormalizationMode.IDENTITY: (),
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


@dataclass(frozen=True)
class Epsilon:
    """How a release of LeRobot keeps a constant feature from dividing by zero."""

    value: float
    always: bool  # added to every range (up to 0.3) instead of replacing a range of zero (0.4+)

    def range(self, low: Floats, high: Floats) -> Floats:
        """The range that values are divided by."""
        span, value = high - low, np.float32(self.value)
        result: Floats = span + value if self.always else np.where(span == 0, value, span)
        return result


# Further statistics: the lowest and highest demonstrated value in the robot's units, whatever the
# scaling makes of them.
RANGE = "lowest", "highest"

# Actions are positions near the state when they are so much closer to it than to their mean.
_NEAR = 0.5

# Demonstrations leave a policy's range when they do so by this share of it.
_BEYOND = 0.5

# LeRobot's processors replace a range of zero by this.
EPSILON = Epsilon(1e-8, always=False)


# A dimension hardly ever moves when what its mode takes for its range is less than this of all that
# it does; one that moves by less than this of its value does not move.
_HARDLY, _STILL = 1e-3, 1e-6


def widened(
    mode: NormalizationMode, stats: Statistics, least: Floats, most: Floats, *, still: bool
) -> tuple[Statistics, NDArray[np.bool_], NDArray[np.bool_]]:
    """Widen what a mode (any but IDENTITY) would divide by, where it is (nearly) zero; all (dim,).

    Returns:
        Statistics for LeRobot's formula; what never moves, and was widened by one of its units to
        either side if `still`; what moves too rarely for its quantiles, and got its minimum and
        maximum instead.
    """
    names = STATISTICS[mode]
    first, second = (stats[name] for name in names)
    fixed = most - least <= _STILL * np.maximum(np.abs(least), np.abs(most))
    hidden = ~fixed & (mode is not NormalizationMode.MEAN_STD)
    if hidden.any():
        hidden &= second - first < _HARDLY * (most - least)
    fixed &= still
    if mode is NormalizationMode.MEAN_STD:
        bounds = first, np.where(fixed, 1, second)
    else:
        low = np.select([fixed, hidden], [least - 1, least], first)
        bounds = low, np.select([fixed, hidden], [most + 1, most], second)
    values = {name: value.astype(np.float32) for name, value in zip(names, bounds, strict=True)}
    return {**stats, **values}, fixed, hidden


def affines(
    mode: NormalizationMode, stats: Statistics, epsilon: Epsilon, dim: int
) -> tuple[Affine, Affine]:
    """Units of the robot -> units of the network, and back; the statistics are (dim,)."""
    if mode is NormalizationMode.IDENTITY:
        return Affine.identity(dim), Affine.identity(dim)
    first, second = (stats[name] for name in STATISTICS[mode])
    zero, one = np.zeros_like(first), np.full_like(first, 1)
    if mode is NormalizationMode.MEAN_STD:
        scale = np.float32(1) / (second + np.float32(epsilon.value))
        return Affine(first, scale, zero), Affine(zero, second, first)
    span = epsilon.range(first, second)
    # Only from 0.4 on does the inverse use the guarded range.
    back = (second - first if epsilon.always else span) / np.float32(2)
    return Affine(first, np.float32(2) / span, -one), Affine(-one, back, first)


def required_statistics(
    key: str, mode: NormalizationMode, stored: Statistics, dim: int
) -> Statistics:
    """The statistics that a checkpoint's mode needs, flattened to (dim,) and checked.

    Raises:
        CheckpointError: one is missing, not finite, or of another width than the feature.
    """
    found = {}
    for name in STATISTICS[mode]:
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


def still_warning(key: str, mode: NormalizationMode, stats: Statistics) -> str:
    """What to say about a state that LeRobot divides by its epsilon; empty if there is none."""
    first, second = (stats[name] for name in STATISTICS[mode])
    still = second == (0 if mode is NormalizationMode.MEAN_STD else first)
    if not still.any():
        return ""
    return (
        f"'{key}' {np.flatnonzero(still).tolist()} did not move in what the policy was trained on "
        f"(by {' and '.join(STATISTICS[mode])}), and LeRobot divides by {EPSILON.value:g} there: "
        f"whatever differs from {first[still].tolist()} on the robot decides what the policy does. "
        "Send exactly that, or train anew with vqbet-train, which widens such statistics"
    )


@dataclass(frozen=True)
class Scalings:
    """Per feature: robot units -> network units, and back.

    Relative actions are scaled behind the subtraction of their state, and back before its addition.
    """

    forward: Mapping[str, Affine]
    backward: Mapping[str, Affine]
    # What both follow from, and of vectors the range that was demonstrated.
    stats: Mapping[str, Statistics]
    # What to say about dimensions that hardly ever move.
    advice: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        dataset: LeRobotDataset,
        config: VQBeTConfig,
        known: Mapping[str, Statistics] | None = None,
    ) -> "Scalings":
        """What the configuration's `normalization_mapping` makes of the data set's statistics.

        Of features that are `known`, of the statistics of a policy that is trained further.

        Raises:
            CheckpointError: known statistics are not those that the mode needs.
            DatasetError: a feature is missing or damaged, or actions are no positions that could
                be relative to the state.
        """
        if config.use_relative_actions:
            _check_positions(dataset, config)
        forward, backward, kept = {}, {}, {}
        advice: list[str] = []
        for key, feature in {**config.input_features, **config.output_features}.items():
            dim = feature.shape[0]
            mode = config.normalization_mapping[feature.type.value]
            if known is not None and key in known:
                kept[key] = _taken(dataset, config, key, known[key], advice)
            else:
                kept[key] = _statistics(dataset, config, key, advice)
            stats = {name: values.reshape(-1) for name, values in kept[key].items()}
            forward[key], backward[key] = affines(mode, stats, EPSILON, dim)
        return cls(forward, backward, kept, tuple(advice))

    def normalize(self, key: str, values: NDArray[np.generic]) -> Tensor:
        """(..., dim) in the robot's units -> float32 (..., dim) in the network's."""
        return torch.from_numpy(self.forward[key].apply(values.astype(np.float32)))


def _statistics(
    dataset: LeRobotDataset, config: VQBeTConfig, key: str, advice: list[str]
) -> Statistics:
    """What a feature is scaled by, and of vectors their range; what to say goes to `advice`."""
    feature = {**config.input_features, **config.output_features}[key]
    mode = config.normalization_mapping[feature.type.value]
    if feature.type is FeatureType.VISUAL:
        return dataset.statistics(key, STATISTICS[mode])
    names = *STATISTICS[mode], "min", "max"
    demonstrated = dict(zip(RANGE, dataset.statistics(key, ("min", "max")).values(), strict=True))
    found = (
        _relative_statistics(dataset, config, names)
        if key == ACTION_KEY and config.use_relative_actions
        else dataset.statistics(key, names)
    )
    least, most = found["min"], found["max"]
    extremes = {"min", "max"} - set(STATISTICS[mode])
    found = {name: value for name, value in found.items() if name not in extremes}
    if mode is NormalizationMode.IDENTITY:
        return demonstrated
    # An action that never moves comes back as it was demonstrated, if nothing is widened.
    stats, still, rare = widened(mode, found, least, most, still=key != ACTION_KEY)
    labels = dataset.features[key].names or tuple(map(str, range(len(least))))
    advice += [
        f"{key} '{labels[i]}' hardly ever moves, and {mode.value} would divide by next to nothing: "
        f"it is scaled by its minimum and maximum ({least[i]:.4g} and {most[i]:.4g}) instead"
        for i in np.flatnonzero(rare).tolist()
    ]
    advice += [
        f"{key} '{labels[i]}' is {least[i]:.4g} in all frames: nobody has shown the policy what to "
        "do when it is something else on the robot"
        for i in np.flatnonzero(still).tolist()
    ]
    return {**stats, **demonstrated}


def _taken(
    dataset: LeRobotDataset, config: VQBeTConfig, key: str, known: Statistics, advice: list[str]
) -> Statistics:
    """A policy's statistics, and of vectors the range that both it and the data set have shown."""
    feature = {**config.input_features, **config.output_features}[key]
    mode = config.normalization_mapping[feature.type.value]
    found = required_statistics(key, mode, known, feature.shape[0])
    if feature.type is FeatureType.VISUAL:
        return {name: value.reshape(3, 1, 1) for name, value in found.items()}
    low, high = dataset.statistics(key, ("min", "max")).values()
    before = [known.get(name, own) for name, own in zip(RANGE, (low, high), strict=True)]
    span = before[1] - before[0]
    beyond = np.maximum(before[0] - low, high - before[1]) > _BEYOND * span
    labels = dataset.features[key].names or tuple(map(str, range(len(low))))
    advice += [
        f"{key} '{labels[i]}' goes from {low[i]:.4g} to {high[i]:.4g}, and in what the checkpoint "
        f"was trained on from {before[0][i]:.4g} to {before[1][i]:.4g}: if the units are the same, "
        "train the codes again with --new-statistics --n-vqvae-training-steps N"
        for i in np.flatnonzero(beyond).tolist()
    ]
    ends = np.minimum(low, before[0]), np.maximum(high, before[1])
    return {**found, **dict(zip(RANGE, ends, strict=True))}


def _distances(dataset: LeRobotDataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(A,) each: mean distance of action i from state i and from its mean, in the robot's units."""
    actions = dataset.column(ACTION_KEY).astype(np.float64)
    states = dataset.column(STATE_KEY)[:, : actions.shape[1]]
    return np.abs(actions - states).mean(axis=0), np.abs(actions - actions.mean(axis=0)).mean(
        axis=0
    )


def relative_advice(dataset: LeRobotDataset, config: VQBeTConfig) -> str:
    """What to say about actions that are positions near the state; empty if they are none."""
    if config.use_relative_actions or config.state_dim < config.action_dim:
        return ""
    from_state, from_mean = _distances(dataset)
    if (from_state > _NEAR * from_mean).any():
        return ""
    shares = ", ".join(f"{share:.0%}" for share in from_state / from_mean)
    return (
        f"actions are positions near the state (at {shares} of their spread): codes then say where "
        "the robot is rather than what it does next; --use-relative-actions learns the distance "
        "instead, see docs/training.md"
    )


def _check_positions(dataset: LeRobotDataset, config: VQBeTConfig) -> None:
    """Raise DatasetError where a relative action is further from its state than from its mean."""
    from_state, from_mean = _distances(dataset)
    for i in np.flatnonzero(config.relative_actions & (from_state > from_mean)).tolist():
        name = config.action_names[i] if config.action_names else str(i)
        raise DatasetError(
            f"use_relative_actions: action '{name}' differs from state {i} by "
            f"{from_state[i]:.3g} on average and from its mean by {from_mean[i]:.3g}, so it is no "
            "position of what that state holds; name it in --relative-exclude-joints, or leave "
            "--use-relative-actions out"
        )


def chunks_of(actions: NDArray[Scalar], width: int) -> NDArray[Scalar]:
    """(T, ...) -> (T, width, ...): the chunk from every step on; the last action is repeated."""
    steps = np.arange(len(actions))[:, None] + np.arange(width)
    chunks: NDArray[Scalar] = actions[steps.clip(max=len(actions) - 1)]
    return chunks


def _relative_statistics(
    dataset: LeRobotDataset, config: VQBeTConfig, names: Sequence[str]
) -> Statistics:
    """Of every frame's chunk, its state subtracted."""
    actions, states = dataset.column(ACTION_KEY), dataset.column(STATE_KEY)
    found: dict[str, list[Floats]] = {name: [] for name in names}
    for i, relative in enumerate(config.relative_actions):  # one at a time: chunks are W times more
        column = np.split(actions[:, i].astype(np.float64), dataset.bounds[1:-1])
        chunks = np.concatenate([chunks_of(part, config.action_chunk_size) for part in column])
        if relative:
            chunks -= states[:, i, None]
        for name, value in vector_statistics(chunks.reshape(-1, 1), names).items():
            found[name].append(value)
    return {name: np.concatenate(values) for name, values in found.items()}


def scale_images(images: Tensor, affine: Affine) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> the network's units."""
    subtract, multiply, add = (
        torch.from_numpy(term).view(-1, 1, 1).to(images.device)
        for term in (affine.subtract, affine.multiply, affine.add)
    )
    return (images - subtract) * multiply + add
