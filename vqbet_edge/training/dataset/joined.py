"""Several LeRobot data sets behind each other, as one."""

import hashlib
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset.dataset import POLICY_VECTORS, Block, LeRobotDataset
from vqbet_edge.training.dataset.frames import Frames
from vqbet_edge.training.dataset.metadata import BASIC, DatasetFeature, Stats, aggregate
from vqbet_edge.training.dataset.table import Array, Indices


class JoinedDataset(LeRobotDataset):
    """Data sets of one robot, their episodes behind each other; the first one names the features.

    Args:
        parts: at least one, opened with the same cameras, `cache_dir` and `resize_shape`.

    Raises:
        DatasetError: one has another rate, or another state, action or camera than the first.
    """

    def __init__(self, parts: Sequence[LeRobotDataset]) -> None:
        vars(self).update(vars(parts[0]))  # how it was opened
        self._parts = parts
        self._columns, self._frames = {}, {}
        episodes = chain.from_iterable(part.info.episodes for part in parts)
        self.info = replace(self.info, episodes=tuple(episodes))
        for part in parts[1:]:
            self._check(part)

    def _check(self, part: LeRobotDataset) -> None:
        first, root = self.info.root, part.info.root
        if part.fps != self.fps:
            raise DatasetError(
                f"{root} has {part.fps:g} frames a second and {first} has {self.fps:g}; data sets "
                "that are joined need one rate"
            )
        for key in (*POLICY_VECTORS, *self.chosen_cameras.keys):
            ours, theirs = (_what(each.features.get(key)) for each in (self, part))
            if ours != theirs:
                raise DatasetError(
                    f"{root}: '{key}' is {theirs}, and {ours} in {first}; data sets that are "
                    "joined need the same state, action and cameras (--cameras chooses some)"
                )

    @property
    def bounds(self) -> Indices:
        """See `LeRobotDataset`."""
        return self._bounds

    @cached_property
    def _bounds(self) -> Indices:
        lengths = [np.diff(part.bounds) for part in self._parts]
        return np.cumsum([0, *np.concatenate(lengths)], dtype=np.int64)

    @property
    def num_episodes(self) -> int:
        """Number of demonstrations."""
        return len(self.bounds) - 1

    def statistics(self, key: str, names: Sequence[str] = BASIC) -> Stats:
        """See `LeRobotDataset`; cameras' are weighted by the frames of each data set."""
        if key not in self.info.cameras:
            return super().statistics(key, names)
        found = []
        for part in self._parts:
            own = part.statistics(key, tuple({*names, "mean"}))
            wide = {name: value.astype(np.float64).reshape(3) for name, value in own.items()}
            found.append({**wide, "count": np.array([part.num_frames], np.float64)})
        joined = aggregate(found, names)
        return {name: value.astype(np.float32).reshape(3, 1, 1) for name, value in joined.items()}

    def column(self, key: str) -> Array:
        """See `LeRobotDataset`."""
        if key not in self._columns:
            self._columns[key] = np.concatenate([part.column(key) for part in self._parts])
        return self._columns[key]

    def decode(self, block: Block) -> Frames:
        """See `LeRobotDataset`."""
        part, position = self._part(block.position)
        return part.decode(block._replace(position=position))

    def for_windows(self) -> LeRobotDataset:
        """See `LeRobotDataset`."""
        twin = copy(self)
        twin._parts = [part.for_windows() for part in self._parts]  # noqa: SLF001 - its own class's
        return twin

    def cache_file(self, key: str) -> Path | None:
        """See `LeRobotDataset`."""
        files = [path for part in self._parts if (path := part.cache_file(key)) is not None]
        if not files:
            return None
        name = hashlib.sha256(repr([path.name for path in files]).encode()).hexdigest()[:32]
        return files[0].with_name(f"{name}.npy")

    def episode(
        self, position: int, keys: Sequence[str] | None = None, steps: slice = slice(None)
    ) -> dict[str, Array]:
        """See `LeRobotDataset`."""
        part, own = self._part(position)
        return part.episode(own, keys, steps)

    @property
    def _sources(self) -> Indices:
        own = [part._sources for part in self._parts]  # noqa: SLF001 - its own class's
        before = np.cumsum([0, *(int(each.max()) + 1 for each in own)])
        return np.concatenate([each + first for each, first in zip(own, before, strict=False)])

    @cached_property
    def parts(self) -> Indices:
        """int64 (episodes,): the number of the data set that each one is from."""
        return np.repeat(np.arange(len(self._parts)), [part.num_episodes for part in self._parts])

    def _part(self, position: int) -> tuple[LeRobotDataset, int]:
        number = int(self.parts[position])
        before = int(np.searchsorted(self.parts, number))
        return self._parts[number], position - before


def _what(feature: DatasetFeature | None) -> str:
    """What has to be the same."""
    if feature is None:
        return "not there"
    names = f" ({', '.join(feature.names)})" if feature.names else ""
    kind = "a camera" if feature.is_rgb else "a depth map" if feature.is_depth else "a vector"
    return f"{kind} of {'x'.join(map(str, feature.shape))}{names}"
