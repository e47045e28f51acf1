"""A LeRobot data set, opened and checked."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.hub import download, is_hub_id, parse_id
from vqbet_edge.training.dataset.frames import Decoder, Frames, Levels, kept_frames
from vqbet_edge.training.dataset.metadata import (
    BASIC,
    DatasetFeature,
    DatasetInfo,
    Stats,
    choose_episodes,
    read_info,
    stored_statistics,
)
from vqbet_edge.training.dataset.table import TIME, Array, Indices, Table
from vqbet_edge.training.files import check_encodable

# What an episode was made of, such as the one that it mirrors: twins give each other away.
SOURCE = "source_episode"
# What a policy reads besides the cameras; checked when a data set is opened.
POLICY_VECTORS = ("observation.state", "action")
# So many frames are decoded at once: whole episodes would need much of the memory that shrinking
# saves.
_AT_ONCE = 32
# Frames that statistics are computed of where `meta/` has none.
_SAMPLED = 10_000

# Tags that LeRobot downloads data sets by.
_REVISIONS = "v3.0", "v2.1"

Size = tuple[int, int]  # (height, width)


class Split(NamedTuple):
    """Positions of the episodes to train on and to validate on, both sorted."""

    train: tuple[int, ...]
    validation: tuple[int, ...]


class Cameras(NamedTuple):
    """Which cameras a policy can look through together, and why not the others."""

    keys: tuple[str, ...]
    left_out: dict[str, str]


class Block(NamedTuple):
    """Frames of one camera that are decoded at once."""

    key: str
    position: int  # of the episode
    steps: slice

    @property
    def length(self) -> int:
        """Number of frames."""
        return int(self.steps.stop - self.steps.start)


Decode = Callable[[Sequence[Block]], Iterable[Frames]]


class LeRobotDataset:
    """Demonstrations in LeRobot's format v3.0 or v2.1.

    Vectors are read when asked for, those of a policy at once; frames are decoded when asked for,
    each one once.
    """

    def __init__(
        self,
        info: DatasetInfo,
        cameras: Sequence[str] | None,
        cache_dir: Path | None,
        resize_shape: Size | None,
    ) -> None:
        self.info, self._resize_shape = info, resize_shape
        self.image_keys = _cameras(info, cameras)
        self._asked_for = cameras is not None
        self._table = Table(info, [key for key in (*POLICY_VECTORS, TIME) if key in info.features])
        self._cache_dir = cache_dir
        self._decoder = Decoder(info, self._table)
        self._columns: dict[str, Array] = {}
        self._frames: dict[str, Frames] = {}
        for key in POLICY_VECTORS:
            if key in info.features:
                self.column(key)
        self._decoder.check(self.image_keys)

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        cameras: Sequence[str] | None = None,
        cache_dir: Path | None = None,
        resize_shape: Size | None = None,
        episodes: Sequence[int | str] | None = None,
    ) -> "LeRobotDataset":
        """Open and check a data set; one that is corrupt or incomplete is refused here.

        Only what a policy needs is looked at: state, action, and the cameras.

        Args:
            source: a folder, or the name of a data set in LeRobot's own folder or on the Hub,
                where it may end in @ and a revision.
            cameras: keys of the cameras; None takes all RGB ones.
            cache_dir: where to keep decoded frames between runs; None keeps them in memory.
            resize_shape: (height, width) that `frames` shrinks to; None keeps them as they are.
            episodes: numbers and ranges of those to take, see `choose_episodes`; None takes all.

        Raises:
            DatasetError: what is wrong, with the file and the episode.
            HubError: it is not here and not to be had from the Hub.
        """
        info = read_info(_locate(str(source), cameras))
        if episodes is not None:
            info = choose_episodes(info, episodes)
        return cls(info, cameras, cache_dir, resize_shape)

    @property
    def features(self) -> Mapping[str, DatasetFeature]:
        """All columns by key."""
        return self.info.features

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.info.fps

    @cached_property
    def chosen_cameras(self) -> Cameras:
        """Those that were asked for, else all RGB ones of the size that most of them have.

        With a `resize_shape`, all that are at least as large; if none is, all.
        """
        if self._asked_for:
            return Cameras(self.image_keys, {})
        shapes = {key: self.features[key].shape for key in self.image_keys}
        if self._resize_shape is None:
            found = list(shapes.values())
            common = max(found, key=found.count, default=())  # the first one's of equally many
            keys = tuple(key for key, shape in shapes.items() if shape == common)
        else:
            low, narrow = self._resize_shape
            fitting = (k for k, shape in shapes.items() if shape[0] >= low and shape[1] >= narrow)
            keys = tuple(fitting) or self.image_keys
        others = {key: str(self.features[key]) for key in self.info.cameras if key not in keys}
        if self._resize_shape is not None:
            why = "smaller than {}x{}".format(*self._resize_shape)
            others |= {key: f"{others[key]}, {why}" for key in self.image_keys if key in others}
        return Cameras(keys, others)

    @property
    def num_episodes(self) -> int:
        """Number of demonstrations."""
        return len(self._table.episodes)

    @property
    def num_frames(self) -> int:
        """Number of frames of all demonstrations."""
        return int(self.bounds[-1])

    @property
    def bounds(self) -> Indices:
        """int64 (episodes + 1,): episode i is frames bounds[i] to bounds[i + 1]."""
        return self._table.bounds

    @property
    def parts(self) -> Indices:
        """int64 (episodes,): the number of the data set that each one is from, of joined ones."""
        return np.zeros(self.num_episodes, np.int64)

    def statistics(self, key: str, names: Sequence[str] = BASIC) -> Stats:
        """Statistics over all frames, float32 (dim,); of cameras in [0, 1], (3, 1, 1).

        Vectors' are computed. Cameras' are those of `meta/`, aggregated over the episodes where
        the whole data set has none, and computed where there are none at all: that decodes.

        Args:
            key: a vector or a camera.
            names: of min, max, mean, std, q01, q10, q50, q90, q99 (quantiles).
        """
        if key not in self.info.cameras:
            return vector_statistics(self.column(key), names)
        found = stored_statistics(self.info, key, names) if names else {}
        if found is None:
            levels = Levels()
            levels.add(chain.from_iterable(self._some_frames(key)))
            wide = levels.statistics(names)
            found = {name: value.astype(np.float32) for name, value in wide.items()}
        return {name: value.reshape(3, 1, 1) for name, value in found.items()}

    def column(self, key: str) -> Array:
        """(frames, dim): one vector feature over all episodes; see `bounds`.

        Raises:
            DatasetError: the data set has no such vector, or it is not whole.
        """
        if key not in self._columns:
            feature = self.features.get(key)
            if feature is None or not feature.is_vector:
                vectors = [k for k, f in self.features.items() if f.is_vector]
                raise DatasetError(
                    f"{self.info.root} has no vector '{key}'"
                    + (f", it is {feature}; write it with one axis" if feature else "")
                    + f"; the vectors are {', '.join(vectors)}"
                )
            self._columns[key] = self._table.vectors(key, feature)
        return self._columns[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """(frames, height, width, 3) of what `frames` returns."""
        return (self.num_frames, *(self._resize_shape or self.features[key].shape[:2]), 3)

    def blocks(self, key: str) -> list[Block]:
        """All frames of a camera in order, in pieces of what is decoded at once."""
        _cameras(self.info, [key])
        return [
            Block(key, position, slice(first, min(first + _AT_ONCE, length)))
            for position, length in enumerate(np.diff(self.bounds).tolist())
            for first in range(0, length, _AT_ONCE)
        ]

    def decode(self, block: Block) -> Frames:
        """uint8 (T, height, width, 3): the frames of a block, shrunk to `resize_shape`.

        Raises:
            DatasetError: they are corrupt, or not of the promised shape.
        """
        frames = self._decoder.read(block.position, block.key, block.steps)
        if self._resize_shape is None:
            return frames
        from vqbet_edge.training.resizing import shrink_frames  # noqa: PLC0415 - torch

        return shrink_frames(frames, self._resize_shape)

    def window(self, key: str, frames: Indices) -> Frames:
        """uint8 (N, height, width, 3): what `frames(key)[frames]` is, decoded for itself.

        Args:
            key: a camera.
            frames: int64 (N,), rising, of one episode and near each other.
        """
        position = int(np.searchsorted(self.bounds, frames[0], side="right")) - 1
        first, last = (int(frame - self.bounds[position]) for frame in frames[[0, -1]])
        decoded = self.decode(Block(key, position, slice(first, last + 1)))
        seen: Frames = decoded.take(frames - frames[0], axis=0)
        return seen

    def for_windows(self) -> "LeRobotDataset":
        """The same data set, for a process that decodes windows here and there."""
        twin = copy(self)
        twin._decoder = Decoder(  # noqa: SLF001 - its own class's
            self.info, self._table, open_files=8, threads=1
        )
        return twin

    def cache_file(self, key: str) -> Path | None:
        """Where a camera's decoded frames are kept between runs."""
        if self._cache_dir is None:
            return None
        name = self._decoder.digest(key)
        if self._resize_shape is not None:
            name += "_{}x{}".format(*self._resize_shape)
        return self._cache_dir / f"{name}.npy"

    def frames(self, key: str, decode: Decode | None = None) -> Frames:
        """uint8 (frames, height, width, 3): one camera over all episodes; see `bounds`.

        Decoded and shrunk at the first call, in memory or memory-mapped from the cache directory.

        Args:
            key: the camera.
            decode: decodes blocks in their order; None is `decode` of one after the other.

        Raises:
            DatasetError: a frame is corrupt.
            DiskError: the cache cannot be written, or is not what was written.
        """
        if key not in self._frames:
            blocks = self.blocks(key)
            ends = np.cumsum([block.length for block in blocks])

            def decoded(first: int) -> Iterator[Frames]:
                begin = int(np.searchsorted(ends, first, side="right"))
                before = first - int(ends[begin - 1]) if begin else first
                for part in (decode or partial(map, self.decode))(blocks[begin:]):
                    yield part[before:]
                    before = 0

            self._frames[key] = kept_frames(decoded, self.shape(key), self.cache_file(key))
        return self._frames[key]

    def episode(
        self, position: int, keys: Sequence[str] | None = None, steps: slice = slice(None)
    ) -> dict[str, Array]:
        """One demonstration: per key (T, dim), for cameras uint8 (T, height, width, 3).

        Args:
            position: 0 to `num_episodes` - 1.
            keys: the features to return; None is state, action and the cameras.
            steps: which of its frames; only they are decoded.
        """
        if keys is None:
            keys = [*(k for k in POLICY_VECTORS if k in self.features), *self.image_keys]
        found: dict[str, Array] = {}
        for key in keys:
            if key in self.info.cameras:
                _cameras(self.info, [key])
                found[key] = self._decoder.read(position, key, steps)
            else:
                found[key] = self.column(key)[self._table.rows(position)][steps]
        return found

    def split(self, validation_fraction: float, seed: int = 0) -> Split:
        """Split by whole episodes, at random but the same for the same seed.

        Those with one number in the column `source_episode`, such as mirror twins, stay together.
        At least one episode stays for training; a fraction above 0 takes at least one for
        validation when there are two.
        """
        sources = self._sources
        groups = int(sources.max()) + 1
        count = min(int(np.ceil(groups * validation_fraction)), groups - 1)
        order = np.random.default_rng(seed).permutation(groups)
        kept = np.isin(sources, order[:count])
        train, validation = (np.flatnonzero(side).tolist() for side in (~kept, kept))
        return Split(tuple(train), tuple(validation))

    @property
    def _sources(self) -> Indices:
        """int64 (episodes,): counted through, which demonstration each one was made of."""
        if SOURCE not in self.features:
            return np.arange(self.num_episodes)
        found: Indices = np.unique(self.column(SOURCE)[self.bounds[:-1], 0], return_inverse=True)[1]
        return found

    def _some_frames(self, key: str) -> Iterator[Frames]:
        """Of large data sets frames of all parts, as LeRobot's `sample_indices`."""
        for block in self.blocks(key)[:: -(-self.num_frames // _SAMPLED)]:
            yield self._decoder.read(block.position, key, block.steps)


def _cameras(info: DatasetInfo, chosen: Sequence[str] | None) -> tuple[str, ...]:
    if chosen is None:
        return tuple(key for key in info.cameras if info.features[key].is_rgb)
    for key in chosen:
        has = ", ".join(f"{k} ({info.features[k]})" for k in info.cameras) or "none"
        if key not in info.cameras:
            raise DatasetError(f"{info.root} has no camera '{key}'; it has {has}")
        if not info.features[key].is_rgb:
            raise DatasetError(
                f"{info.root}: '{key}' is {info.features[key]}, and a policy sees RGB images "
                f"(height x width x 3); the cameras are {has}"
            )
    return tuple(chosen)


def _locate(source: str, cameras: Sequence[str] | None) -> Path:
    """The data set's folder: as named, else in LeRobot's own folder, else from the Hub."""
    here = at_hand(source)
    if here is not None:
        check_encodable(here)
        return here
    if (parsed := parse_id(source)) is None:
        raise DatasetError(f"{source} is neither a folder nor the id of a data set on the Hub")
    fetch, revision = partial(download, parsed.name, "dataset"), parsed.revision
    # What LeRobot itself has downloaded, which the client completes where it has not all.
    cache = _lerobot_home() / "hub"
    known = cache / f"datasets--{parsed.name.replace('/', '--')}"
    if known.is_dir():
        fetch = partial(fetch, cache=cache)
        named = (name for name in _REVISIONS if (known / "refs" / name).is_file())
        revision = revision or next(named, None)
    folder = fetch(["meta/*"], revision)
    # Who checks no camera when opening reads some later.
    keys = _cameras(read_info(folder), cameras or None)
    wanted = [f"videos/*{key}/*" for key in keys]
    # A snapshot's name is its commit, so that all files are of one.
    return fetch(["meta/*", "data/*", *wanted], folder.name)


def at_hand(source: str) -> Path | None:
    """The data set's folder, as named or in LeRobot's own folder; None if it is not here."""
    if Path(source).is_dir():
        return Path(source)
    recorded = _lerobot_home() / source
    return recorded if is_hub_id(source) and (recorded / "meta").is_dir() else None


def _lerobot_home() -> Path:
    """Where `lerobot.utils.constants`, which is slow to import, has it."""
    try:
        from huggingface_hub.constants import HF_HOME  # noqa: PLC0415 - not everybody has it
    except ImportError:
        cache = os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "huggingface")  # noqa: PTH118
        HF_HOME = os.path.expandvars(os.path.expanduser(os.getenv("HF_HOME", cache)))  # noqa: N806, PTH111
    return Path(os.getenv("HF_LEROBOT_HOME", Path(HF_HOME) / "lerobot")).expanduser()


def vector_statistics(values: npt.NDArray[Any], names: Sequence[str]) -> Stats:
    """The named statistics of values (frames, dim)."""
    # float64: a float32 sum over millions of frames loses digits.
    wide = values.astype(np.float64)
    found = {
        name: np.quantile(wide, int(name[1:]) / 100, axis=0)
        if name.startswith("q")
        else getattr(wide, name)(axis=0)
        for name in names
    }
    return {name: value.astype(np.float32) for name, value in found.items()}
