"""Observations to verify, calibrate and measure on: pieces of episodes, spread over their source.

The source is a data set in LeRobot's format, or what `EdgePolicy.record` wrote on the robot.

Letters: M steps of a piece, K cameras, H and W image height and width, S width of the state or
goal, 0 where there is none.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.runtime.cameras import pack_frames
from vqbet_edge.runtime.extras import install_command
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.recording_format import EPISODE, files, is_feature

# Long enough for the window to fill and move on.
PIECE_STEPS = 16
# Of so many episodes or fewer, quarters are what pieces are spread over.
_FEW_EPISODES = 3
_QUARTERS = 4
# In a row and in a column of a random frame.
_PATCHES = 5
# However many pieces there are, their places in time are spread evenly.
_GOLDEN = 0.6180339887

Array = NDArray[Any]


class Piece(NamedTuple):
    """Consecutive observations of one episode, as a robot with an empty history would see them."""

    frames: NDArray[np.uint8]  # (M, K, H, W, 3), whole frames: see `pack_frames`
    states: NDArray[np.float32]  # (M, S), in the robot's units


class Place(NamedTuple):
    """Where a piece comes from."""

    episode: int  # its position in the source
    start: int
    stop: int
    block: int  # number of the episode, or of the part of one, that it was taken from


class Source(ABC):
    """Observations by episode, read when asked for."""

    name: str  # as the user gave it
    lengths: Sequence[int]  # steps of every episode
    shapes: Mapping[str, tuple[int, ...]]  # of one value of every key
    fps: float | None = None  # observations a second, where it says

    def demonstrated(self, key: str) -> Array | None:  # noqa: ARG002
        """float32 (2, dim): lowest and highest value of a vector; None where it is no data set."""
        return None

    def names(self, key: str) -> Sequence[str]:  # noqa: ARG002
        """Of a vector's numbers; empty where it has none."""
        return ()

    @abstractmethod
    def read(self, place: Place, keys: Sequence[str]) -> dict[str, Array]:
        """Arrays (M, ...) of some keys."""


def open_source(source: str | Path, episodes: Sequence[int | str] | None = None) -> Source:
    """A folder that `EdgePolicy.record` wrote, or a LeRobot data set; see `LeRobotDataset.open`.

    `episodes` chooses those of a data set.

    Raises:
        DatasetError: it is neither, or damaged.
        UsageError: it is a data set, and the packages that read one are not installed.
    """
    folder = Path(source)
    if folder.is_dir() and (paths := files(folder)):
        return _Recording(str(source), paths)
    return _Dataset(str(source), episodes)


class _Dataset(Source):
    """A LeRobot data set; only what is asked for is decoded."""

    def __init__(self, source: str, episodes: Sequence[int | str] | None) -> None:
        try:
            from vqbet_edge.training.dataset.dataset import LeRobotDataset  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise UsageError(
                f"reading a data set needs '{error.name}'; type: {install_command('data')}"
            ) from error
        self._dataset = LeRobotDataset.open(source, cameras=(), episodes=episodes)
        self.name, self.fps = source, self._dataset.fps
        self.lengths = np.diff(self._dataset.bounds).tolist()
        self.shapes = {key: feature.shape for key, feature in self._dataset.features.items()}

    def demonstrated(self, key: str) -> Array | None:
        """See `Source`."""
        if key not in self.shapes or not self._dataset.features[key].is_vector:
            return None
        return np.stack([*self._dataset.statistics(key, ("min", "max")).values()])

    def names(self, key: str) -> Sequence[str]:
        """See `Source`."""
        return self._dataset.features[key].names if key in self.shapes else ()

    def read(self, place: Place, keys: Sequence[str]) -> dict[str, Array]:
        """See `Source`."""
        return self._dataset.episode(place.episode, keys, slice(place.start, place.stop))


class _Recording(Source):
    """Files that `vqbet_edge.runtime.recording` describes; rows are read when asked for."""

    def __init__(self, source: str, paths: Sequence[Path]) -> None:
        self.name, self._paths = source, paths
        episodes: list[Array] = []
        try:
            for path in paths:
                with safe_open(path, "numpy") as file:
                    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
                    if EPISODE not in shapes:
                        raise DatasetError(
                            f"'{path}' holds no recording of observations; record again"
                        )
                    episodes.append(file.get_tensor(EPISODE))
        except (SafetensorError, OSError) as error:
            raise self._unreadable(error) from error
        self.shapes = {k: tuple(shape[1:]) for k, shape in shapes.items() if is_feature(k)}
        # Rows of all files, counted through.
        self._firsts: list[int] = np.cumsum([0, *map(len, episodes)]).tolist()
        numbers = np.concatenate(episodes)
        self._bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        self.lengths = np.diff(self._bounds).tolist()

    def read(self, place: Place, keys: Sequence[str]) -> dict[str, Array]:
        """See `Source`."""
        start, stop = (self._bounds[place.episode] + step for step in (place.start, place.stop))
        parts: list[dict[str, Array]] = []
        try:
            for path, (first, last) in zip(self._paths, pairwise(self._firsts), strict=True):
                if first < stop and start < last:
                    rows = slice(max(start, first) - first, min(stop, last) - first)
                    with safe_open(path, "numpy") as file:
                        parts.append({key: file.get_slice(key)[rows] for key in keys})
            joined = {key: np.concatenate([part[key] for part in parts]) for key in keys}
        except (SafetensorError, OSError, ValueError) as error:
            raise self._unreadable(error) from error
        if any(len(values) != stop - start for values in joined.values()):
            raise self._unreadable("observations are missing")
        return joined

    def _unreadable(self, reason: object) -> DatasetError:
        return DatasetError(
            f"the recordings in '{self.name}' cannot be read: {reason}; record again"
        )


@dataclass(frozen=True)
class Sampler:
    """Pieces of a source that fit the policy of a bundle."""

    source: Source
    manifest: Manifest

    @classmethod
    def open(cls, source: str | Path, manifest: Manifest) -> "Sampler":
        """Open a source (see `open_source`) and check that it is this policy's.

        Raises:
            DatasetError: it is damaged, lacks a key, or a key has another shape.
            HubError: it is not here and not to be had from the Hub.
            UsageError: see `open_source`.
        """
        opened = open_source(source)
        check_features(opened, manifest.observation_shapes)
        return cls(opened, manifest)

    def pieces(self, steps: int) -> Iterator[Piece]:
        """Pieces of `places(steps)`, one in memory at a time."""
        return map(self.read, self.places(steps))

    def places(self, steps: int) -> list[Place]:
        """Places of about `steps` observations, spread over episodes and time.

        None overlap, so of a small source there are fewer.
        """
        lengths = self.source.lengths
        # The episodes, or quarters of them when there are few; short ones if there are no others.
        parts = 1 if len(lengths) > _FEW_EPISODES else _QUARTERS
        least = min(PIECE_STEPS, max(1, max(lengths, default=0) // parts))
        blocks = [
            (episode, length * part // parts, length * (part + 1) // parts)
            for episode, length in enumerate(lengths)
            for part in range(parts)
            if length // parts >= least
        ]
        wanted = -(-steps // PIECE_STEPS)
        count = min(wanted, len(blocks))
        chosen = np.linspace(0, len(blocks) - 1, count).round().astype(int).tolist()
        places: list[Place] = []
        for i, number in enumerate(chosen):
            episode, first, last = blocks[number]
            length = last - first
            cells = min(wanted // count + (i < wanted % count), max(1, length // PIECE_STEPS))
            for cell in range(cells):
                free = max(0, length // cells - PIECE_STEPS)
                start = first + length * cell // cells
                start += int((free + 1) * (len(places) * _GOLDEN % 1))
                places.append(Place(episode, start, min(start + PIECE_STEPS, last), i))
        return places

    def read(self, place: Place) -> Piece:
        """The observations of one place; see `read_piece`."""
        return read_piece(self.source, place, self.manifest)


def read_piece(source: Source, place: Place, manifest: Manifest) -> Piece:
    """The observations of one place, as a policy makes them.

    Raises:
        DatasetError: they are damaged, or a state is not finite.
    """
    arrays = source.read(place, tuple(manifest.observation_shapes))
    none = np.zeros((place.stop - place.start, 0))
    states = arrays.get(manifest.state_key, none).astype(np.float32)
    finite = np.isfinite(states).all(axis=1)
    if not finite.all():
        raise DatasetError(
            f"the state of episode {place.episode}, step {place.start + int(finite.argmin())} "
            f"is not finite in '{source.name}'; repair the data or leave the episode out"
        )
    return Piece(pack_frames([arrays[key] for key in manifest.image_keys]), states)


def check_features(source: Source, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a source that lacks a key, or has it in another shape.

    Raises:
        DatasetError: says which.
    """
    remedy = "use the data set that the policy was trained on, or a recording of its own robot"
    missing = [key for key in expected if key not in source.shapes]
    if missing:
        raise DatasetError(
            f"the observations in '{source.name}' lack {missing}, which the policy observes; they "
            f"have {sorted(source.shapes)}; {remedy}"
        )
    for key, shape in expected.items():
        if source.shapes[key] != shape:
            raise DatasetError(
                f"the policy observes '{key}' of shape {shape}, '{source.name}' has "
                f"{source.shapes[key]}; {remedy}"
            )


def random_pieces(manifest: Manifest, state_scaling: Affine, steps: int) -> Iterator[Piece]:
    """So many frames of patches and noise, and states that normalisation maps to [-1, 1].

    Noise alone is the same to an encoder wherever it looks, and so would hide what it does wrong.
    """
    random = np.random.default_rng(0)
    for first in range(0, steps, PIECE_STEPS):
        count = min(PIECE_STEPS, steps - first)
        shape = (count, len(manifest.image_keys), *manifest.frame_shape)
        normalized = random.uniform(-1, 1, (count, manifest.state_dim))
        states = (normalized - state_scaling.add) / state_scaling.multiply + state_scaling.subtract
        yield Piece(patches(random, shape), states.astype(np.float32))


def patches(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """uint8 (..., H, W, 3): frames of patches of one colour each, with noise over them."""
    *leading, height, width, channels = shape
    across = -(-height // _PATCHES), -(-width // _PATCHES)
    coarse = random.integers(0, 192, (*leading, _PATCHES, _PATCHES, channels), np.uint8)
    large = coarse.repeat(across[0], axis=-3).repeat(across[1], axis=-2)[..., :height, :width, :]
    frames: NDArray[np.uint8] = large + random.integers(0, 64, shape, np.uint8)
    return frames
