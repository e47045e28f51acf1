"""The episodes of one recording, or of a folder of them as `vqbet-eval --record` leaves it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.runtime.manifest import Text
from vqbet_edge.runtime.recorded import RecordedEpisode, Recording
from vqbet_edge.runtime.recording_format import files

INDEX_NAME = "episodes.json"


class EpisodeOutcome(Struct, frozen=True):
    """How a simulated episode went; `folder` is its recording, beside the index."""

    folder: Text
    seed: int
    success: bool
    max_reward: float
    steps: int


class EpisodeIndex(Struct, frozen=True):
    """`episodes.json`: failures first, and of those the lowest reward first."""

    env: Text
    policy: Text
    episodes: list[EpisodeOutcome]

    @classmethod
    def of(cls, env: str, policy: str, episodes: Sequence[EpisodeOutcome]) -> "EpisodeIndex":
        """In its order."""
        return cls(env, policy, sorted(episodes, key=lambda e: (e.success, e.max_reward, e.seed)))

    def encode(self) -> bytes:
        """The file."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


@dataclass(frozen=True)
class ShownEpisode:
    """An episode and where it comes from.

    Attributes:
        recording: that it is part of.
        episode: what was recorded.
        outcome: how it went, where that is known.
    """

    recording: Recording
    episode: RecordedEpisode
    outcome: EpisodeOutcome | None

    @property
    def name(self) -> str:
        """For people."""
        if self.outcome is None:
            first = int(self.episode.steps[0])
            behind = f", from its step {first}" if first else ""
            return f"episode {self.episode.number}{behind}"
        went = "solved" if self.outcome.success else "failed"
        return f"{went}, seed {self.outcome.seed}, reward {self.outcome.max_reward:.3g}"


def open_episodes(folder: Path, numbers: Sequence[int] = ()) -> list[ShownEpisode]:
    """All episodes of a folder, failures first where that is known, otherwise in their order.

    Args:
        folder: a recording, or a folder whose folders are recordings.
        numbers: positions, from 0, of those that are wanted; empty is all.

    Raises:
        DatasetError: there is no recording with decisions, or a damaged one.
        UsageError: a number is too large.
    """
    if files(folder):
        recording = Recording(folder)
        found = [ShownEpisode(recording, episode, None) for episode in recording.episodes]
    else:
        found = _of_evaluation(folder)
    wrong = [number for number in numbers if not 0 <= number < len(found)]
    if wrong:
        raise UsageError(f"--episodes {wrong[0]}: '{folder}' has 0 to {len(found) - 1}")
    return [found[number] for number in numbers] if numbers else found


def first_shown(shown: Sequence[ShownEpisode]) -> int:
    """The place of the first that succeeded; of the first of all where none is known to have."""
    return next((i for i, e in enumerate(shown) if e.outcome and e.outcome.success), 0)


def _of_evaluation(folder: Path) -> list[ShownEpisode]:
    inside = sorted(path for path in folder.glob("*") if files(path))
    if not inside:
        Recording(folder)  # says what was expected
    outcomes = _outcomes(folder / INDEX_NAME)
    # What was still running when the evaluation was ended comes last.
    places = {name: place for place, name in enumerate(outcomes)}
    inside.sort(key=lambda path: places.get(path.name, len(places)))
    recordings = [(Recording(path), outcomes.get(path.name)) for path in inside]
    return [ShownEpisode(r, e, outcome) for r, outcome in recordings for e in r.episodes]


def _outcomes(path: Path) -> dict[str, EpisodeOutcome]:
    """By the recording's folder; nothing is opened by a name that stands here."""
    if not path.is_file():
        return {}
    try:
        index = msgspec.json.decode(path.read_bytes(), type=EpisodeIndex)
    except msgspec.DecodeError as error:
        raise DatasetError(f"'{path}' is no index of episodes: {error}; delete it") from error
    return {outcome.folder: outcome for outcome in index.episodes}
