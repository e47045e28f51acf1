"""Observations to act on: from a data set, or seeded random ones that vary."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import Affine, Floats

MAX_OBSERVATIONS = 200
# They are part of every policy's memory.
MAX_BYTES = 32_000_000


@dataclass(frozen=True)
class Observations:
    """What every policy acts on, over and over.

    Letters: M observations, H and W image height and width, S state width.

    Attributes:
        images: by key, in the policy's own order, uint8 (M, H, W, 3).
        state_key: key of the states.
        states: float32 (M, S), in the robot's units.
        normalized_states: float32 (M, S), as the checkpoint normalises them.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state_key: str
    states: Floats
    normalized_states: Floats

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """As `EdgePolicy.act` takes it; starts over behind the last."""
        row = step % len(self)
        images = {key: frames[row] for key, frames in self.images.items()}
        return {**images, self.state_key: self.states[row]}


def create_observations(bundle: Bundle, dataset: str | None) -> Observations:
    """Observations that fit a bundle.

    Args:
        bundle: says what the policy observes.
        dataset: a folder in LeRobot's format or the id of a data set on the Hub; None makes
            random observations.

    Raises:
        DatasetError: the data set does not fit the policy.
    """
    manifest = bundle.manifest
    frame_bytes = len(manifest.image_keys) * int(np.prod(manifest.image_shape))
    count = max(1, min(MAX_OBSERVATIONS, MAX_BYTES // frame_bytes))
    scaling = Affine.from_arrays(bundle.arrays, "state", manifest.state_dim)
    if dataset is None:
        images, states = _random(manifest, scaling, count)
    else:
        images, states = _recorded(manifest, dataset, count)
    normalized = scaling.apply(states, np.empty_like(states))
    return Observations(images, manifest.state_key, states, normalized)


def _random(
    manifest: Manifest, scaling: Affine, count: int
) -> tuple[dict[str, NDArray[np.uint8]], Floats]:
    """Noise, and states over the range that normalisation maps to [-1, 1]."""
    random = np.random.default_rng(0)
    shape = (count, *manifest.image_shape)
    images = {key: random.integers(0, 256, shape, np.uint8) for key in manifest.image_keys}
    normalized = random.uniform(-1, 1, (count, manifest.state_dim))
    states = (normalized - scaling.add) / scaling.multiply + scaling.subtract
    return images, states.astype(np.float32)


def _recorded(
    manifest: Manifest, source: str, count: int
) -> tuple[dict[str, NDArray[np.uint8]], Floats]:
    try:
        from vqbet_edge.training.dataset import LeRobotDataset  # noqa: PLC0415 - robots lack it
    except ModuleNotFoundError as error:
        raise UsageError(
            f"reading a data set needs '{error.name}'; type: pip install 'vqbet-edge[data]', "
            "or leave --dataset out for random observations"
        ) from error
    dataset, keys = LeRobotDataset.open(source), [*manifest.image_keys, manifest.state_key]
    missing = [key for key in keys if key not in dataset.features]
    if missing:
        raise DatasetError(
            f"the data set lacks {missing}, which the policy observes; it has "
            f"{sorted(dataset.features)}; leave --dataset out for random observations"
        )
    episodes: list[dict[str, Any]] = []
    while sum(len(e[keys[-1]]) for e in episodes) < count and len(episodes) < dataset.num_episodes:
        episodes.append(dataset.episode(len(episodes), keys))
    joined = {key: np.concatenate([e[key] for e in episodes])[:count].copy() for key in keys}
    images = {key: joined[key] for key in manifest.image_keys}
    wrong = [frames.shape[1:] for frames in images.values()]
    if any(shape != manifest.image_shape for shape in wrong):
        raise DatasetError(
            f"the policy observes images {manifest.image_shape}, the data set has {wrong}; "
            "use the data set that the policy was trained on"
        )
    return images, joined[manifest.state_key].astype(np.float32)
