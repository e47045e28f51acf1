"""Calibration samples: pieces of what the robot saw, spread over episodes and time.

The source is a LeRobot data set, or observations that `EdgePolicy.record` wrote. Random numbers
are no source: ranges taken from noise clip what a camera shows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vqbet_calibration.recordings import Recordings
from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.dataset import LeRobotDataset

Array = NDArray[Any]

# Long enough for the window to fill and move on.
PIECE_STEPS = 16
# Of so many pieces one is for choosing, one for verifying, the others are for ranges.
PARTS = 4
MIN_OBSERVATIONS = 64
# Normalised states lie in [-1, 1], or have a deviation of 1; a median this far out is no accident.
_FOREIGN = 5.0


@dataclass(frozen=True)
class Piece:
    """Consecutive observations of one episode.

    Letters: M steps, K cameras, H and W image height and width, S state width.

    Attributes:
        episode: where it comes from.
        start: its first step there.
        frames: uint8 (M, K, H, W, 3), whole frames.
        states: float32 (M, S), in the robot's units.
    """

    episode: int
    start: int
    frames: NDArray[np.uint8]
    states: NDArray[np.float32]


def batches(pieces: Sequence[Piece], size: int) -> list[Sequence[Piece]]:
    """Groups of `size`; pieces are used again where the last group lacks some."""
    return [
        [pieces[i % len(pieces)] for i in range(start, start + size)]
        for start in range(0, len(pieces), size)
    ]


@dataclass(frozen=True)
class Samples:
    """What to calibrate on.

    Attributes:
        source: as the user named it.
        calibration: pieces to take ranges from.
        held_out: pieces of other episodes, to choose methods and layers by.
        verification: pieces of yet others, to verify the result on.
        digest: SHA-256 of all pieces, with their places.
    """

    source: str
    calibration: tuple[Piece, ...]
    held_out: tuple[Piece, ...]
    verification: tuple[Piece, ...]
    digest: str

    @property
    def observations(self) -> int:
        """How many, in all parts."""
        pieces = (*self.calibration, *self.held_out, *self.verification)
        return sum(len(piece.states) for piece in pieces)


class Episodes(Protocol):
    """A source of observations, episode by episode."""

    @property
    def lengths(self) -> Sequence[int]:
        """Steps of every episode."""

    def load(self, episode: int, keys: Sequence[str]) -> dict[str, Array]:
        """Arrays (T, ...) of one episode by observation key."""


class _Dataset:
    """A LeRobot data set."""

    def __init__(self, source: str) -> None:
        self._dataset = LeRobotDataset.open(source)
        self.lengths: Sequence[int] = np.diff(self._dataset.bounds).tolist()

    def load(self, episode: int, keys: Sequence[str]) -> dict[str, Array]:
        """See `Episodes`."""
        missing = [key for key in keys if key not in self._dataset.features]
        if missing:
            raise DatasetError(
                f"the data set lacks {missing}, which the policy observes; it has "
                f"{sorted(self._dataset.features)}"
            )
        return self._dataset.episode(episode, keys)


def load_samples(source: str, manifest: Manifest, state_scaling: Affine, steps: int) -> Samples:
    """Take samples for a policy.

    Args:
        source: a folder or Hub id in LeRobot's format, or a folder of recorded observations.
        manifest: of the policy's bundle.
        state_scaling: of its states.
        steps: how many observations, at least `MIN_OBSERVATIONS`.

    Raises:
        DatasetError: too little, constant or damaged data, or another robot's.
    """
    episodes: Episodes = (
        Recordings.open(Path(source)) if Recordings.are_in(Path(source)) else _Dataset(source)
    )
    pieces = _spread(episodes, manifest, steps)
    held_out, verification = tuple(pieces[PARTS - 2 :: PARTS]), tuple(pieces[PARTS - 1 :: PARTS])
    calibration = tuple(p for i, p in enumerate(pieces) if i % PARTS < PARTS - 2)
    samples = Samples(source, calibration, held_out, verification, _digest(pieces))
    _check_amount(samples)
    _check_frames(manifest, pieces)
    _check_states(manifest, state_scaling, pieces)
    return samples


def _spread(episodes: Episodes, manifest: Manifest, steps: int) -> list[Piece]:
    """Pieces of one length; a stretch is in one part only."""
    stretches = _stretches(episodes.lengths)
    count = -(-max(steps, MIN_OBSERVATIONS) // PIECE_STEPS)
    chosen = [stretches[i] for i in _evenly(len(stretches), min(count, len(stretches)))]
    chosen = chosen[: len(chosen) // PARTS * PARTS]
    places: dict[int, list[tuple[int, int]]] = {}  # episode -> position in the list, first step
    for i in range(count if chosen else 0):
        episode, start, stop = chosen[i % len(chosen)]
        # Golden ratio: however many pieces there are, their places in time are spread evenly.
        place = start + int((stop - start - PIECE_STEPS + 1) * (i * 0.6180339887 % 1))
        places.setdefault(episode, []).append((i, place))
    pieces: dict[int, Piece] = {}
    for episode, wanted in places.items():  # each one is decoded once
        arrays = episodes.load(episode, [*manifest.image_keys, manifest.state_key])
        for i, place in wanted:
            rows = slice(place, place + PIECE_STEPS)
            pieces[i] = _piece(arrays, manifest, episode, rows)
    return [pieces[i] for i in sorted(pieces)]


def _stretches(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(episode, start, stop): the episodes, or quarters of them when there are few."""
    parts = 1 if len(lengths) >= PARTS else PARTS
    return [
        (episode, length * part // parts, length * (part + 1) // parts)
        for episode, length in enumerate(lengths)
        for part in range(parts)
        if length >= parts * PIECE_STEPS
    ]


def _evenly(total: int, count: int) -> list[int]:
    positions: list[int] = np.linspace(0, total - 1, count).round().astype(int).tolist()
    return positions


def _piece(arrays: Mapping[str, Array], manifest: Manifest, episode: int, rows: slice) -> Piece:
    found = {key: value[rows] for key, value in arrays.items()}
    expected = {
        **dict.fromkeys(manifest.image_keys, manifest.image_shape),
        manifest.state_key: (manifest.state_dim,),
    }
    for key, shape in expected.items():
        if found[key].shape[1:] != shape:
            raise DatasetError(
                f"the policy observes '{key}' of shape {shape}, the data has "
                f"{found[key].shape[1:]}; calibrate on what this policy's own robot sees"
            )
    frames = np.stack([found[key] for key in manifest.image_keys], axis=1)  # a copy
    states = found[manifest.state_key].astype(np.float32)
    if not np.isfinite(states).all():
        step = rows.start + int(np.argwhere(~np.isfinite(states))[0][0])
        raise DatasetError(
            f"the state of episode {episode}, step {step} is not finite; mend the data or leave "
            "the episode out"
        )
    return Piece(episode, rows.start, frames, states)


def _digest(pieces: Sequence[Piece]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(f"{piece.episode} {piece.start} {piece.frames.shape}".encode())
        digest.update(np.ascontiguousarray(piece.frames).tobytes())
        digest.update(piece.states.tobytes())
    return digest.hexdigest()


def _check_amount(samples: Samples) -> None:
    if samples.observations < MIN_OBSERVATIONS or not samples.verification:
        raise DatasetError(
            f"'{samples.source}' has {samples.observations} usable observations (pieces of "
            f"{PIECE_STEPS} steps), calibration needs at least {MIN_OBSERVATIONS}, better 1024 "
            "from many episodes; record more with policy.record(path)"
        )


def _check_frames(manifest: Manifest, pieces: Sequence[Piece]) -> None:
    for camera, key in enumerate(manifest.image_keys):
        first = pieces[0].frames[0, camera]
        if all((piece.frames[:, camera] == first).all() for piece in pieces):
            raise DatasetError(
                f"all frames of '{key}' are the same; is the camera covered or disconnected? "
                "Calibrate on what the robot sees while it works"
            )


def _check_states(manifest: Manifest, scaling: Affine, pieces: Sequence[Piece]) -> None:
    states = np.concatenate([piece.states for piece in pieces])
    normalized = scaling.apply(states, np.empty_like(states))
    medians = np.median(np.abs(normalized), axis=0)
    worst = int(medians.argmax())
    if medians[worst] > _FOREIGN:
        raise DatasetError(
            f"'{manifest.state_key}' looks like another robot's: element {worst} is around "
            f"{np.median(states[:, worst]):g}, {medians[worst]:.0f} times as far from the centre "
            "of the policy's training data as that data reaches; calibrate on data of this robot"
        )
