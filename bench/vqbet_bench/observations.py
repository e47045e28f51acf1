"""Observations to act on: from a data set, or seeded random ones that vary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import Affine

MAX_OBSERVATIONS = 200
# They are part of every contender's memory.
MAX_BYTES = 32_000_000
_STATES, _NORMALIZED = "states", "normalized_states"


class Pool(NamedTuple):
    """Observations that every contender cycles through.

    Letters: M observations, H and W image height and width, S state width.
    """

    images: Mapping[str, NDArray[np.uint8]]  # (M, H, W, 3) by key, the policy's own order
    state_key: str
    states: NDArray[np.float32]  # (M, S), in the robot's units
    normalized_states: NDArray[np.float32]  # (M, S), as the checkpoint normalises them

    @property
    def size(self) -> int:
        """Bytes."""
        frames = sum(frames.nbytes for frames in self.images.values())
        return frames + self.states.nbytes + self.normalized_states.nbytes

    def observation(self, index: int) -> dict[str, Any]:
        """As `EdgePolicy.act` takes it; starts over behind the last."""
        row = index % len(self.states)
        images = {key: frames[row] for key, frames in self.images.items()}
        return {**images, self.state_key: self.states[row]}

    def save(self, path: Path) -> None:
        """Write a file for `load`."""
        images = {f"image {key}": frames for key, frames in self.images.items()}
        arrays = {**images, _STATES: self.states, _NORMALIZED: self.normalized_states}
        np.savez(path, key=np.array(self.state_key), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str) -> "Pool":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            images = {n.removeprefix("image "): file[n] for n in file if n.startswith("image ")}
            return cls(images, str(file["key"]), file[_STATES], file[_NORMALIZED])


def create_pool(bundle: Bundle, dataset: str | None, seed: int = 0) -> Pool:
    """Observations that fit a bundle.

    Args:
        bundle: says what the policy observes.
        dataset: a folder in LeRobot's format or the id of a data set on the Hub; None makes
            random observations.
        seed: of the random observations.

    Raises:
        DatasetError: the data set does not fit the policy.
    """
    manifest = bundle.manifest
    frame_bytes = len(manifest.image_keys) * int(np.prod(manifest.image_shape))
    count = max(1, min(MAX_OBSERVATIONS, MAX_BYTES // frame_bytes))
    scaling = Affine.from_arrays(bundle.arrays, "state", manifest.state_dim)
    if dataset is None:
        images, states = _random(manifest, scaling, count, seed)
    else:
        images, states = _recorded(manifest, dataset, count)
    normalized = scaling.apply(states, np.empty_like(states))
    return Pool(images, manifest.state_key, states, normalized)


def _random(
    manifest: Manifest, scaling: Affine, count: int, seed: int
) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32]]:
    """Noise, and states over the range that normalisation maps to [-1, 1]."""
    random = np.random.default_rng(seed)
    shape = (count, *manifest.image_shape)
    images = {key: random.integers(0, 256, shape, np.uint8) for key in manifest.image_keys}
    normalized = random.uniform(-1, 1, (count, manifest.state_dim))
    states = (normalized - scaling.add) / scaling.multiply + scaling.subtract
    return images, states.astype(np.float32)


def _recorded(
    manifest: Manifest, source: str, count: int
) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32]]:
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
