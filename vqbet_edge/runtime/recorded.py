"""Reading recordings: what `vqbet_edge.runtime.recording_format` describes, episode by episode.

Everything but frames is read at once; frames when they are asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime import recording_format as fmt
from vqbet_edge.runtime.recording_format import Array, Mark, Outcome, PolicyInfo, RecordingInfo
from vqbet_edge.runtime.sampling import Decision

_WITHOUT = (
    "holds observations without decisions; record with "
    "`with policy.record(folder, decisions=True): ...`"
)


class _Versioned(msgspec.Struct):
    format_version: int


@dataclass(frozen=True)
class RecordedEpisode:
    """Rows between two resets, or as far as they were recorded without a gap.

    Attributes:
        number: in its recording; grows.
        steps: int64 (T,), observations since the reset; the first is 0 unless something is missing.
        times: int64 (T,), when each came, ns since 1970.
        observation_times: int64 (T,), when each was taken, likewise; 0 where not known.
        states: float32 (T, S), in the robot's units.
        actions: float32 (T, A), handed out; NaN where `act` raised.
        seconds: float64 (T,), that `act` took; NaN where it raised.
        outcomes: uint8 (T,), see `Outcome`.
        decisions: row -> what was decided on it.
        marks: row -> what was marked when it was the newest.
    """

    number: int
    steps: NDArray[np.int64]
    times: NDArray[np.int64]
    observation_times: NDArray[np.int64]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    seconds: NDArray[np.float64]
    outcomes: NDArray[np.uint8]
    decisions: Mapping[int, Decision]
    marks: Mapping[int, tuple[Mark, ...]]
    _recording: "Recording"
    _first: int

    def __len__(self) -> int:
        return len(self.steps)

    def frame(self, key: str, row: int) -> NDArray[np.uint8]:
        """One camera's frame (H, W, 3).

        Raises:
            DatasetError: it cannot be read.
        """
        return self._recording.frame(key, self._first + row)

    def observation(self, row: int) -> dict[str, Array]:
        """What `EdgePolicy.act` was called with."""
        info = self._recording.info
        frames = {key: self.frame(key, row) for key in info.image_keys}
        return {**frames, info.state_key: self.states[row]}

    def history_is_whole(self, row: int, window: int) -> bool:
        """Whether all observations of the window behind a row are here."""
        return int(self.steps[0]) == 0 or row >= window - 1


class Recording:
    """A folder that `EdgePolicy.record` wrote with decisions.

    Attributes:
        folder: where it is.
        info: what its files say about it.
        policy: whose decisions they are.
        episodes: in order.
        marks: in order, also those of observations that are not here any more.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder.

        Raises:
            DatasetError: it holds no recording, one without decisions, or a damaged one.
        """
        self.folder = Path(folder)
        self._paths = fmt.files(self.folder)
        self.marks: list[Mark] = []
        if not self._paths:
            raise DatasetError(
                f"'{folder}' holds no recording: expected files {fmt.FILE_PATTERN}; record "
                "one with `with policy.record(folder, decisions=True): ...`"
            )
        try:
            parts = [self._read(path) for path in self._paths]
            self._firsts = np.cumsum([0, *(len(part[fmt.EPISODE]) for part in parts)])
            self.episodes = list(self._episodes(parts))
        except (SafetensorError, OSError, KeyError, ValueError, IndexError, TypeError) as error:
            raise self._unreadable(error) from error

    @property
    def policy(self) -> PolicyInfo:
        """Whose decisions they are."""
        assert self.info.policy is not None  # noqa: S101 - checked when it was opened
        return self.info.policy

    def frame(self, key: str, row: int) -> NDArray[np.uint8]:
        """One frame (H, W, 3) of one of all rows."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        try:
            with safe_open(self._paths[number], "numpy") as file:
                frame: NDArray[np.uint8] = file.get_slice(key)[row - int(self._firsts[number])]
        except (SafetensorError, OSError, ValueError) as error:
            raise self._unreadable(error) from error
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise self._unreadable(f"'{key}' holds no frames")
        return frame

    def _read(self, path: Path) -> dict[str, Array]:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            self.info = _info(path, metadata.get(fmt.METADATA))
            # A DecodeError is a ValueError.
            self.marks += msgspec.json.decode(metadata.get(fmt.MARKS, "[]"), type=list[Mark])
            keys = [k for k in file.keys() if k in fmt.OWN or k.startswith(fmt.DECISION)]  # noqa: SIM118
            arrays = {key: file.get_tensor(key) for key in (*keys, self.info.state_key)}
        # Files of before it was kept.
        arrays.setdefault(fmt.OBSERVATION_TIME, np.zeros(len(arrays[fmt.EPISODE]), np.int64))
        wrong = _misfit(arrays, self.info)
        if wrong is not None:
            raise self._unreadable(f"{path.name}: {wrong} is not as the format has it")
        return arrays

    def _episodes(self, parts: Sequence[Mapping[str, Array]]) -> Iterator[RecordedEpisode]:
        state = self.info.state_key
        rows = {key: np.concatenate([part[key] for part in parts]) for key in (*fmt.OWN, state)}
        numbers, steps = rows[fmt.EPISODE], rows[fmt.STEP]
        # A file that was lost leaves a gap that no number shows.
        cuts = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(steps) != 1)) + 1
        made = {
            (episode, decision.step): decision
            for part in parts
            for row, episode in enumerate(part.get(fmt.DECISION_EPISODE, np.zeros(0)).tolist())
            for decision in (fmt.unpack_decision(part, row),)
        }
        marked: dict[tuple[int, int], tuple[Mark, ...]] = {}
        for mark in self.marks:
            place = mark.episode, mark.step
            marked[place] = (*marked.get(place, ()), mark)
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)], strict=True):
            part = slice(first, last)
            at = [(int(numbers[first]), step) for step in steps[part].tolist()]
            yield RecordedEpisode(
                number=int(numbers[first]),
                steps=steps[part],
                times=rows[fmt.TIME][part],
                observation_times=rows[fmt.OBSERVATION_TIME][part],
                states=rows[state][part],
                actions=rows[fmt.ACTION][part],
                seconds=rows[fmt.SECONDS][part],
                outcomes=rows[fmt.OUTCOME][part],
                decisions={row: made[place] for row, place in enumerate(at) if place in made},
                marks={row: marked[place] for row, place in enumerate(at) if place in marked},
                _recording=self,
                _first=first,
            )

    def _unreadable(self, reason: object) -> DatasetError:
        return DatasetError(
            f"the recording in '{self.folder}' cannot be read: {reason}; copy it again, or delete "
            "the file that is damaged"
        )


def _misfit(arrays: Mapping[str, Array], info: RecordingInfo) -> str | None:
    """The first key whose type, shape or values no recorder writes; a missing one is a KeyError."""
    rows, width = arrays[fmt.ACTION].shape
    state_dim, codes = arrays[info.state_key].shape[-1], 0
    expected = [(rows, fmt.row_columns(info.state_key, state_dim, width))]
    if fmt.DECISION_EPISODE in arrays:
        made, _, codes = arrays[f"{fmt.DECISION}code_probabilities"].shape
        chunk = arrays[f"{fmt.DECISION}action_chunk"].shape[1], width
        seconds = {k: ("float64", ()) for k in arrays if k.startswith(fmt.STAGE_SECONDS)}
        expected.append((made, {**fmt.decision_columns(codes, chunk), **seconds}))
    for count, columns in expected:
        for key, (dtype, shape) in columns.items():
            if arrays[key].dtype != dtype or arrays[key].shape != (count, *shape):
                return f"'{key}'"
    limits = None if info.policy is None else info.policy.action_limits
    if limits is not None and {len(limit) for limit in limits} != {width}:
        return "the number of action limits"
    times = dict.fromkeys((fmt.TIME, fmt.OBSERVATION_TIME), 1 << 63)
    # MCAP has 32 bits for a step.
    steps = dict.fromkeys((fmt.STEP, fmt.DECISION_STEP), 1 << 32)
    ranges = {f"{fmt.DECISION}codes": codes, fmt.OUTCOME: len(Outcome), **times, **steps}
    for key, end in ranges.items():
        if key in arrays and not ((arrays[key] >= 0) & (arrays[key] < end)).all():
            return f"a value of '{key}'"
    impossible = (key for key, values in arrays.items() if not _possible(key, values))
    return next((f"a value of '{key}'" for key in impossible), None)


def _possible(key: str, values: Array) -> bool:
    """Whether every number is finite, or NaN where that says that there was none."""
    if values.dtype.kind != "f":
        return True
    may_lack = key in {fmt.ACTION, fmt.SECONDS} or key.startswith(fmt.STAGE_SECONDS)
    return bool((np.isfinite(values) | (may_lack & np.isnan(values))).all())


def _info(path: Path, text: str | None) -> RecordingInfo:
    if text is None:
        raise DatasetError(f"'{path}' {_WITHOUT}")
    try:
        version = msgspec.json.decode(text, type=_Versioned).format_version
        if version != fmt.FORMAT_VERSION:
            raise DatasetError(
                f"'{path}' has format {version}, expected {fmt.FORMAT_VERSION}; read it with the "
                "version of vqbet_edge that recorded it"
            )
        info = msgspec.json.decode(text, type=RecordingInfo)
    except msgspec.DecodeError as error:
        raise DatasetError(f"'{path}' is no recording of ours: {error}; record again") from error
    if info.policy is None:
        raise DatasetError(f"'{path}' {_WITHOUT}")
    return info
