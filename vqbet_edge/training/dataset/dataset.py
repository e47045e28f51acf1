"""A LeRobot data set, opened and checked."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset.cache import cached_frames
from vqbet_edge.training.dataset.columns import read_columns
from vqbet_edge.training.dataset.frames import Frames, Times, check_videos, iter_episode_frames
from vqbet_edge.training.dataset.metadata import DatasetFeature, DatasetInfo, read_info

Array = npt.NDArray[Any]
Stats = dict[str, npt.NDArray[np.float32]]


class Split(NamedTuple):
    """Positions of the episodes to train on and to validate on, both sorted."""

    train: tuple[int, ...]
    validation: tuple[int, ...]


class LeRobotDataset:
    """Demonstrations in LeRobot's format v3.0 or v2.1.

    Vectors are in memory from the start; frames are decoded when asked for, each one once.
    """

    def __init__(self, info: DatasetInfo, cache_dir: Path | None = None) -> None:
        self.info = info
        self._columns = read_columns(info)
        self._cache_dir = cache_dir
        self._frames: dict[str, Frames] = {}
        check_videos(info, [self._times(i) for i in range(len(info.episodes))])

    @classmethod
    def open(cls, source: str | Path, *, cache_dir: Path | None = None) -> "LeRobotDataset":
        """Open and check a data set; corrupt or incomplete ones are refused here.

        Args:
            source: a folder, or the id of a data set on the Hub ("lerobot/pusht").
            cache_dir: where to keep decoded frames between runs; None keeps them in memory.

        Raises:
            DatasetError: what is wrong, with the file and the episode.
        """
        root = Path(source)
        if not root.is_dir():
            root = _download(str(source))
        return cls(read_info(root), cache_dir)

    @property
    def features(self) -> Mapping[str, DatasetFeature]:
        """All columns by key."""
        return self.info.features

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.info.fps

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Keys of the cameras."""
        return self.info.image_keys

    @property
    def num_episodes(self) -> int:
        """Number of demonstrations."""
        return len(self.info.episodes)

    @property
    def num_frames(self) -> int:
        """Number of frames of all demonstrations."""
        return int(self.bounds[-1])

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """int64 (episodes + 1,): episode i is frames bounds[i] to bounds[i + 1]."""
        lengths = [episode.length for episode in self.info.episodes]
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    @cached_property
    def stats(self) -> dict[str, Stats]:
        """Per feature of floats: min, max, mean and std, float32 (dim,).

        Images have the statistics of `meta/stats.json`, (3, 1, 1) in [0, 1], where it has them.
        """
        floats = [k for k, f in self.features.items() if f.dtype.startswith("float")]
        stats = {key: _stats(self.column(key)) for key in floats if key in self._columns}
        for key in self.image_keys:
            if key in self.info.stats:
                stats[key] = {
                    name: np.asarray(self.info.stats[key][name], np.float32).reshape(3, 1, 1)
                    for name in ("min", "max", "mean", "std")
                }
        return stats

    def column(self, key: str) -> Array:
        """(frames, dim): one vector feature over all episodes; see `bounds`.

        Raises:
            DatasetError: the data set has no such vector.
        """
        if key not in self._columns:
            raise DatasetError(
                f"{self.info.root} has no vector '{key}'; it has {', '.join(self._columns)}"
            )
        return self._columns[key]

    def frames(self, key: str) -> Frames:
        """uint8 (frames, height, width, 3): one camera over all episodes; see `bounds`.

        Decoded at the first call, in memory or memory-mapped from the cache directory.
        """
        self._check_camera(key)
        if key not in self._frames:
            positions = range(self.num_episodes)
            parts = iter_episode_frames(
                self.info, key, positions, [self._times(i) for i in positions]
            )
            shape = (self.num_frames, *self.features[key].shape)
            cache = self._cache_dir and self._cache_dir / f"{self._digest(key)}.npy"
            self._frames[key] = cached_frames(parts, shape, cache)
        return self._frames[key]

    def episode(self, position: int, keys: Sequence[str] | None = None) -> dict[str, Array]:
        """One demonstration.

        Args:
            position: 0 to `num_episodes` - 1.
            keys: the features to return; None is all vectors and cameras.

        Returns:
            Per key (T, dim), for cameras uint8 (T, height, width, 3).
        """
        chosen = keys if keys is not None else (*self._columns, *self.image_keys)
        rows = slice(self.bounds[position], self.bounds[position + 1])
        return {
            key: self._episode_frames(position, key)
            if key in self.image_keys
            else self.column(key)[rows]
            for key in chosen
        }

    def split(self, validation_fraction: float, seed: int = 0) -> Split:
        """Split by whole episodes, at random but the same for the same seed.

        At least one episode stays for training; a fraction above 0 takes at least one for
        validation when there are two.
        """
        count = int(np.ceil(self.num_episodes * validation_fraction))
        count = min(count, self.num_episodes - 1)
        order = np.random.default_rng(seed).permutation(self.num_episodes).tolist()
        return Split(tuple(sorted(order[count:])), tuple(sorted(order[:count])))

    def _episode_frames(self, position: int, key: str) -> Frames:
        if key in self._frames:
            return self._frames[key][self.bounds[position] : self.bounds[position + 1]]
        return next(iter_episode_frames(self.info, key, [position], [self._times(position)]))

    def _times(self, position: int) -> Times:
        rows = slice(self.bounds[position], self.bounds[position + 1])
        seconds: Times = self.column("timestamp")[rows, 0].astype(np.float64)
        return seconds

    def _check_camera(self, key: str) -> None:
        if key not in self.image_keys:
            raise DatasetError(
                f"{self.info.root} has no camera '{key}'; it has "
                f"{', '.join(self.image_keys) or 'none'}"
            )

    def _digest(self, key: str) -> str:
        """Changes when any file that holds the camera's frames does."""
        paths = {e.clips[key].path if key in e.clips else e.data_path for e in self.info.episodes}
        facts = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths)]
        return hashlib.sha256(repr((key, facts)).encode()).hexdigest()[:32]


def _stats(values: Array) -> Stats:
    # float64: a float32 sum over millions of frames loses digits.
    mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    parts = {"min": values.min(0), "max": values.max(0), "mean": mean, "std": std}
    return {name: np.asarray(value, np.float32) for name, value in parts.items()}


def _download(source: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise DatasetError(f"{source} is neither a folder nor the id of a data set on the Hub")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional, and slow
    except ImportError as e:
        raise DatasetError(
            f"{source} is no folder; to take it from the Hub: pip install huggingface-hub"
        ) from e
    try:
        return Path(snapshot_download(source, repo_type="dataset"))
    except Exception as e:  # the client raises many types, all of them mean the same here
        raise DatasetError(f"{source} is no folder and not to be had from the Hub: {e}") from e
