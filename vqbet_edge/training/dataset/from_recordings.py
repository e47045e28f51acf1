"""`vqbet-dataset`: recordings as a LeRobot data set, to look at, to correct and to train on."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from vqbet_edge.cli import parse, run
from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.training.dataset.writer import Demonstration, write_dataset
from vqbet_edge.training.files import new_directory
from vqbet_edge.view.episodes import ShownEpisode, open_episodes

#: The column that says where something was marked.
MARK = "mark"
# Between the rate at which observations came and that of the demonstrations, before it is said.
_RATES_DIFFER = 0.1


@dataclass(frozen=True)
class DatasetConfig:
    """Make a LeRobot data set, format 3.0, out of recordings with decisions.

    Raises:
        UsageError: a value is out of its range, or the folder is there already.
    """

    # What policy.record(..., decisions=True) or vqbet-eval --record wrote.
    recordings: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    # Folder to write.
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    # What was done, in words; by default that the bundle was recorded.
    task: str | None = None
    # Observations a second. By default those of the policy's demonstrations, and where they are
    # not known, as often as observations came.
    fps: float | None = None

    def __post_init__(self) -> None:
        if not self.recordings:
            raise UsageError("expected the folder of a recording, got none")
        if self.fps is not None and not 0 < self.fps < np.inf:
            raise UsageError(f"--fps: expected a positive number, got {self.fps}")
        if self.output.exists():
            raise UsageError(f"--output {self.output} is there already; choose another folder")


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        episodes, frames: how many.
        left_out: observations on which `act` raised: they have no action, and end an episode.
        fps: as written.
        measured: observations a second as they came; None where there were no two in a row.
        marks: episode, frame in it, text.
    """

    episodes: int
    frames: int
    left_out: int
    fps: float
    measured: float | None
    marks: list[tuple[int, int, str]]


class _Piece(NamedTuple):
    """Rows of an episode that all have an action."""

    shown: ShownEpisode
    rows: range


def make_dataset(config: DatasetConfig) -> Made:
    """Write the data set; every stretch of rows with actions is an episode of it.

    Raises:
        DatasetError: a recording is missing or damaged, has no action, or has other features than
            the first.
        UsageError: the rate is not known.
        DiskError: it cannot be written.
    """
    shown = [one for folder in config.recordings for one in open_episodes(folder)]
    pieces = [piece for one in shown for piece in _pieces(one)]
    if not pieces:
        raise DatasetError(f"'{config.recordings[0]}' has no observation with an action")
    _check_alike(pieces)
    policy = pieces[0].shown.recording.policy
    measured = _measured(pieces)
    fps = config.fps or policy.fps or measured
    if fps is None:
        raise UsageError("how often observations came is not known; say it with --fps")
    task = config.task or f"recorded with {policy.bundle}"
    with new_directory(config.output) as folder:
        write_dataset(folder, map(_demonstration, pieces), fps, task)
    frames = sum(len(piece.rows) for piece in pieces)
    marks = [
        (number, row - piece.rows.start, mark.text)
        for number, piece in enumerate(pieces)
        for row, marked in sorted(piece.shown.episode.marks.items())
        if row in piece.rows
        for mark in marked
    ]
    left_out = sum(len(one.episode) for one in shown) - frames
    return Made(len(pieces), frames, left_out, fps, measured, marks)


def _pieces(shown: ShownEpisode) -> Iterator[_Piece]:
    has_action = np.isfinite(shown.episode.actions).all(axis=1)
    edges = np.flatnonzero(np.diff(has_action, prepend=False, append=False)).tolist()
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield _Piece(shown, range(first, end))


def _check_alike(pieces: Sequence[_Piece]) -> None:
    """Raise DatasetError unless all have the features of the first."""
    expected = _features(pieces[0])
    for piece in pieces:
        if (got := _features(piece)) != expected:
            raise DatasetError(
                f"the recording in '{piece.shown.recording.folder}' has {got}, that in "
                f"'{pieces[0].shown.recording.folder}' {expected}; make a data set of each"
            )


def _features(piece: _Piece) -> dict[str, tuple[int, ...]]:
    episode, info = piece.shown.episode, piece.shown.recording.info
    frames = {key: episode.frame(key, piece.rows.start).shape for key in info.image_keys}
    return {**frames, info.state_key: episode.states.shape[1:], "action": episode.actions.shape[1:]}


def _measured(pieces: Sequence[_Piece]) -> float | None:
    """Observations a second, by the middle of all that passed between two."""
    times = [piece.shown.episode.times[piece.rows.start : piece.rows.stop] for piece in pieces]
    between = np.concatenate([np.diff(each) for each in times])
    middle = float(np.median(between)) if len(between) else 0.0
    return float(f"{1e9 / middle:.3g}") if middle > 0 else None


def _demonstration(piece: _Piece) -> Demonstration:
    episode, rows = piece.shown.episode, piece.rows
    info, part = piece.shown.recording.info, slice(rows.start, rows.stop)
    return {
        **{key: np.stack([episode.frame(key, row) for row in rows]) for key in info.image_keys},
        info.state_key: episode.states[part],
        "action": episode.actions[part],
        MARK: np.array([[row in episode.marks] for row in rows]),
    }


def text(made: Made) -> str:
    """What was made, for a terminal."""
    lines = [f"{made.episodes} episodes, {made.frames} observations, {made.fps:g} a second"]
    if made.measured and abs(made.measured / made.fps - 1) > _RATES_DIFFER:
        lines.append(
            f"warning: observations came {made.measured:g} a second (a simulator does not wait); "
            f"--fps {made.measured:g} if that is how fast the robot was driven"
        )
    if made.left_out:
        lines.append(f"{made.left_out} observations without an action were left out")
    lines += [f"episode {number}, frame {frame}: {words}" for number, frame, words in made.marks]
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    config = parse(DatasetConfig, "vqbet-dataset")
    sys.stdout.write(f"{text(make_dataset(config))}\n{config.output}\n")
