"""Recording what the robot really sees and what the policy decides, without making it wait.

`vqbet_edge.runtime.recording_format` says what is written. Every file is complete when it gets its
name, and a file ends after 8 MiB or 5 seconds: a robot that is killed or switched off loses the
newest few observations only.
"""

import contextlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vqbet_edge.errors import DiskError, UsageError
from vqbet_edge.runtime import recording_format as fmt
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.recording_format import Array, Mark, Outcome, PolicyInfo, RecordingInfo
from vqbet_edge.runtime.sampling import Decision
from vqbet_edge.runtime.worker import Backlog, Worker

_BLOCK_BYTES = 8 << 20
_BLOCK_SECONDS = 5.0
# Blocks that may be filled, waiting or being written at the same time.
_BLOCKS = 8
# A ring consists of so many files at least, so that it is never empty but for the newest.
_RING_FILES = 4
# Of a mark's text.
_MARK_LENGTH = 1000
# That a file of a block may take; a disk that hangs takes for ever.
_PATIENCE_S = 30.0
_LOG = logging.getLogger(__name__)

#: What a full recording keeps: it ends, or its oldest files make room.
Keep = Literal["first", "last"]


class _Block:
    """Rows that will be one file; its memory is used again for a later file."""

    def __init__(self, columns: fmt.Columns, rows: int) -> None:
        self._arrays = {
            key: np.empty((rows, *shape), dtype) for key, (dtype, shape) in columns.items()
        }
        self._capacity = rows
        self.clear()

    def clear(self) -> None:
        """Begin a new file."""
        self.rows, self._began = 0, 0.0
        self.decisions: list[tuple[int, Decision]] = []
        self.marks: list[Mark] = []

    def ended(self, now: float) -> bool:
        """Whether the next row belongs to another file."""
        return self.rows == self._capacity or (self.rows > 0 and now - self._began > _BLOCK_SECONDS)

    def append(self, row: Mapping[str, Any], now: float) -> None:
        """Copy a row; frames may also be float32 (3, H, W) in [0, 1]."""
        if self.rows == 0:
            self._began = now
        for key, value in row.items():
            column = self._arrays[key]
            column[self.rows] = _frame(value) if column.ndim == 4 else value
        self.rows += 1

    def amend(self, row: Mapping[str, Any]) -> None:
        """Write more columns of the newest row."""
        for key, value in row.items():
            self._arrays[key][self.rows - 1] = value

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.rows or self.decisions or self.marks)

    def metadata(self) -> dict[str, str]:
        """What the file says beside it."""
        return {fmt.MARKS: msgspec.json.encode(self.marks).decode()} if self.marks else {}

    def contents(self) -> dict[str, Array]:
        """What the file holds."""
        rows = {key: column[: self.rows] for key, column in self._arrays.items()}
        return rows | fmt.pack_decisions(self.decisions)


class _Ring:
    """The files of a recording that keeps the newest; used by the writer's thread alone."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._files: deque[tuple[Path, int]] = deque()

    def take(self, path: Path, size: int) -> None:
        """Count a file that gets its name now; the oldest go until there is room for it."""
        while self._files and self._left < size:
            oldest, freed = self._files.popleft()
            oldest.unlink(missing_ok=True)
            self._left += freed
        self._files.append((path, size))
        self._left -= size


class Recorder:
    """Writes observations, and decisions if asked to, to a folder of limited size.

    A full one ends, or with `keep="last"` the oldest files make room for the newest.

    Files are written by a thread of their own, from a fixed number of blocks: acting never waits
    for the disk, and memory does not grow. While a disk is so slow that no block is free, rows are
    left out; the rows behind such a gap are an episode of their own, whose first `step` is not 0.
    A disk that fails ends the recording, not the robot's work. Both are logged when they happen,
    and `close` reports them.

    `policy` says whose decisions are recorded too, None for observations alone; `step` how many
    observations the current episode has had already. Marks are made by `mark`, at the first of
    failed calls in a row and at the first of late ones: late for the guards, or longer than the
    period of the demonstrations where that is known.

    Raises:
        UsageError: the folder holds a recording, the limit is below one row (below four with
            `keep="last"`), or a feature has a name that the recording needs.
        DiskError: the folder cannot be made.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        max_bytes: int,
        policy: PolicyInfo | None = None,
        step: int = 0,
        keep: Keep = "first",
    ) -> None:
        if keep not in {"first", "last"}:
            raise UsageError(f"unknown keep '{keep}'; known: first, last")
        self._manifest, self.folder = manifest, folder
        columns = _columns(manifest, with_decisions=policy is not None)
        self._decision_bytes = 0 if policy is None else _decision_bytes(manifest)
        self._row_bytes = _row_bytes(columns)
        whole = self._row_bytes + self._decision_bytes
        needed = whole if keep == "first" else whole * _RING_FILES
        if needed > max_bytes:
            of = "one observation has" if keep == "first" else f"{_RING_FILES} observations have"
            raise UsageError(f"{of} {needed} bytes, more than the limit of {max_bytes}")
        features = *manifest.image_keys, manifest.state_key
        if taken := [key for key in features if not fmt.is_feature(key)]:
            raise UsageError(
                f"the policy's features {taken} have names that a recording needs for itself; "
                "rename them in the data set and train again"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if fmt.files(folder):
                raise UsageError(f"'{folder}' holds a recording already; choose another folder")
        except OSError as error:
            raise DiskError(f"cannot record to '{folder}': {error.strerror}") from error
        info = RecordingInfo(fmt.FORMAT_VERSION, manifest.image_keys, manifest.state_key, policy)
        self._metadata = {fmt.METADATA: msgspec.json.encode(info).decode()}
        self._with_decisions = policy is not None
        if keep == "first":
            self._bytes_left: float = max_bytes
            self._ring: _Ring | None = None
            rows = max(1, min(_BLOCK_BYTES, max_bytes) // self._row_bytes)
        else:
            self._bytes_left, self._ring = math.inf, _Ring(max_bytes)
            rows = max(1, min(_BLOCK_BYTES, max_bytes // _RING_FILES) // whole)
        self._free = [_Block(columns, rows) for _ in range(_BLOCKS)]
        self._block: _Block | None = self._free.pop()
        self._episode, self._step, self._files, self._lost = 0, step, 0, 0
        # Whether rows were left out since the last that was kept; whether the newest was kept.
        self._gap = self._kept = False
        # From the thread that plans, which may be another than the one that acts.
        self._decided: deque[Decision] = deque()
        # From any thread.
        self._marked: deque[Mark] = deque()
        # Whether the latest call failed; whether the latest action was late; when one is.
        self._failed = self._late = False
        self._period = math.inf if manifest.fps is None else 1 / manifest.fps
        self._writer = Worker("vqbet-recording", finish=True)
        # From Python 3.12 on, no thread begins at Python's end, where `close` may be called.
        self._writer.submit(lambda: None)
        self._writing: Backlog[None] = Backlog()
        self._error: DiskError | None = None
        self._full = False
        # Wall clocks jump; this one is read once.
        self._epoch = time.time_ns() - time.monotonic_ns()

    def begin_episode(self) -> None:
        """What follows is a new episode."""
        self._take_decisions()
        self._episode += 1
        self._step, self._gap = 0, False

    def append(self, observation: Mapping[str, Any], taken: float | None = None) -> None:
        """Take a copy of an observation that has been checked; nothing once the limit is met.

        `taken` is when it was, in seconds of `time.monotonic()`, None where that is not known.
        """
        step, self._step = self._step, self._step + 1
        now = time.monotonic()
        block = self._block_for_row(now)
        self._kept = block is not None
        if block is None:
            return
        manifest = self._manifest
        row = {key: np.asarray(observation[key]) for key in manifest.image_keys}
        state = observation[manifest.state_key] if manifest.state_dim else ()
        row[manifest.state_key] = np.asarray(state).reshape(-1)
        own: dict[str, Any] = {fmt.EPISODE: self._episode, fmt.STEP: step}
        if self._with_decisions:
            own[fmt.TIME] = self._epoch + time.monotonic_ns()
            own[fmt.OBSERVATION_TIME] = 0 if taken is None else self._epoch + int(taken * 1e9)
            own |= {fmt.ACTION: np.nan, fmt.SECONDS: np.nan, fmt.OUTCOME: Outcome.RAISED}
        block.append(row | own, now)
        self._bytes_left -= self._row_bytes

    def decided(self, decision: Decision) -> None:
        """Keep a decision until `acted` is called; any thread may call this."""
        if self._with_decisions:
            self._decided.append(decision)

    def mark(self, text: str) -> None:
        """Mark this moment; any thread may call this."""
        plain = "".join(c if c.isprintable() else " " for c in text[:_MARK_LENGTH])
        step, now = max(self._step - 1, 0), self._epoch + time.monotonic_ns()
        if not self._full:
            self._marked.append(Mark(self._episode, step, now, plain))

    def failed(self, error: Exception) -> None:
        """A call raised."""
        if self._failed:
            return
        self._failed = True
        self.mark(f"{type(error).__name__}: {error}")
        # The next thing may be the switch.
        if self._ring is not None:
            self._take_decisions()
            self._hand_over_marks()

    def acted(self, action: NDArray[np.float32], seconds: float, outcome: Outcome) -> None:
        """The action (A,) for the newest observation, as handed out after so many seconds."""
        slow = outcome == Outcome.ACTED and seconds > self._period
        late = slow or outcome == Outcome.LATE
        if late and not self._late:
            self.mark(f"late: {seconds * 1e3:.1f} ms")
        self._failed, self._late = False, late
        if self._with_decisions:
            if self._block is not None and self._kept:
                self._block.amend({fmt.ACTION: action, fmt.SECONDS: seconds, fmt.OUTCOME: outcome})
            self._take_decisions()
        # Now, so that it is written while the robot moves, not while the next call computes.
        if self._block is not None and self._block.ended(time.monotonic()):
            self._hand_over()

    def close(self) -> None:
        """Write what is left and stop.

        Raises:
            DiskError: something could not be written, was left out because the disk was slow, or
                is not written yet because the disk hangs.
        """
        self._take_decisions()
        self._hand_over_marks()
        self._full = True
        if self._writing.running(_PATIENCE_S):
            raise DiskError(
                f"the disk hangs: a file of the recording in '{self.folder}' was not written in "
                f"{_PATIENCE_S:.0f} s; what has a name there is whole, the newest is missing"
            )
        if self._error is not None:
            raise self._error
        if self._lost:
            raise DiskError(
                f"the disk was too slow: {self._lost} observations are missing in "
                f"'{self.folder}', the others are there; record to a faster disk, or less often"
            )

    def _take_decisions(self) -> None:
        while self._decided:
            decision = self._decided.popleft()
            block = None if self._full else self._open_block()
            if block is not None:
                block.decisions.append((self._episode, decision))
                self._bytes_left -= self._decision_bytes

    def _block_for_row(self, now: float) -> _Block | None:
        """Where the next row goes; None when it is not recorded."""
        if self._full:
            return None
        if not self._has_room():
            self._full = True
            _LOG.warning("the recording in '%s' is full; nothing more is recorded", self.folder)
            self._hand_over()
            return None
        if self._block is not None and self._block.ended(now):
            self._hand_over()
        block = self._open_block()
        if block is not None and self._gap:
            self._gap = False
            self._episode += 1
        return block

    def _open_block(self) -> _Block | None:
        """The block that is being filled; None while the disk is too slow to have one free."""
        if self._block is None and self._free:
            self._block = self._free.pop()
        elif self._block is None:
            if not self._lost:
                _LOG.warning(
                    "the disk is too slow for the recording in '%s': observations are left out",
                    self.folder,
                )
            self._lost, self._gap = self._lost + 1, True
        return self._block

    def _has_room(self) -> bool:
        return self._bytes_left >= self._row_bytes + self._decision_bytes

    def _hand_over(self) -> None:
        """Let the current block be written."""
        block, self._block = self._block, None
        if block is None:
            return
        while self._marked:
            block.marks.append(self._marked.popleft())
        if block.empty:
            self._free.append(block)
        else:
            path = self.folder / fmt.FILE_PATTERN.replace("*", f"{self._files:06}")
            self._files += 1
            self._writing.check()
            self._writing.add(self._writer.submit(lambda: self._write(path, block)))

    def _hand_over_marks(self) -> None:
        """Let the current block be written, or one for marks alone."""
        if self._block is None and self._free and self._marked and not self._full:
            self._block = self._free.pop()
        self._hand_over()

    def _write(self, path: Path, block: _Block) -> None:
        """On the writer's thread."""
        if self._error is None:
            partial = path.with_suffix(".partial")
            try:
                _write_file(partial, block.contents(), self._metadata | block.metadata())
                if self._ring is not None:
                    self._ring.take(path, partial.stat().st_size)
                partial.rename(path)
            except Exception as error:  # noqa: BLE001 - whatever it is, the robot acts on
                reason = getattr(error, "strerror", None) or error
                self._error = DiskError(f"cannot write '{path}': {reason}; recording has ended")
                self._full = True
                _LOG.warning("%s", self._error)
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
        block.clear()
        self._free.append(block)


def _write_file(path: Path, arrays: Mapping[str, Array], metadata: dict[str, str]) -> None:
    save_file(dict(arrays), path, metadata)
    # Otherwise a robot that is switched off may have the name without the bytes.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _columns(manifest: Manifest, *, with_decisions: bool) -> fmt.Columns:
    """Key -> dtype and shape of a row."""
    columns = dict(fmt.row_columns(manifest.state_key, manifest.state_dim, manifest.action_dim))
    if not with_decisions:
        for key in set(fmt.OWN) - {fmt.EPISODE, fmt.STEP}:
            del columns[key]
    return columns | {key: ("uint8", shape) for key, shape in manifest.image_shapes.items()}


def _decision_bytes(manifest: Manifest) -> int:
    chunk = manifest.policy.action_chunk_size, manifest.action_dim
    # And four stages' seconds.
    return 32 + _row_bytes(fmt.decision_columns(manifest.policy.vqvae_n_embed, chunk))


def _row_bytes(columns: fmt.Columns) -> int:
    return sum(np.dtype(dtype).itemsize * math.prod(s) for dtype, s in columns.values())


def _frame(image: Array) -> Array:
    """As uint8 (H, W, 3)."""
    image = image.reshape(image.shape[-3:])
    if image.dtype == np.uint8:
        return image
    return np.rint(np.moveaxis(image, -3, -1) * np.float32(255)).astype(np.uint8)
