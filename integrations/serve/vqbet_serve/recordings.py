"""What the robots of a server saw and what was decided for them, the newest of it on disk."""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import DiskError, UsageError, VQBeTEdgeError

_LOG = logging.getLogger(__name__)


class Recordings:
    """A recording per session in one folder, of limited size all together.

    Half of the room is for sessions that are open, each a ring of the newest; the rest for those
    that have ended, also of earlier servers, of which the oldest go first. A disk that fails ends a
    recording and is logged; robots go on.

    Args:
        folder: where to; made, if it is not there.
        max_bytes: of all recordings together.
        most: sessions at the same time.

    Raises:
        UsageError: the limit is no positive number.
        DiskError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int, most: int) -> None:
        if max_bytes < 1:
            raise UsageError("expected --record-megabytes above 0")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"cannot record to '{folder}': {error.strerror}") from error
        self._folder, self._max_bytes = folder, max_bytes
        self._each = max_bytes // (2 * most)
        self._open: set[Path] = set()
        self._lock = threading.Lock()

    @contextmanager
    def recording(self, policy: EdgePolicy) -> Iterator[None]:
        """Record a session's policy; nothing is raised but what the block raises."""
        # Never a name that a client chooses.
        folder = self._folder / f"session_{time.time_ns()}"
        with ExitStack() as stack:
            try:
                with self._lock:
                    self._open.add(folder)
                    self._make_room()
                recorder = policy.record(folder, decisions=True, max_bytes=self._each, keep="last")
                stack.enter_context(_logging(recorder))
            except (VQBeTEdgeError, OSError) as error:
                _LOG.error("a session is not recorded: %s", error)
            try:
                yield
            finally:
                stack.close()
                with self._lock:
                    self._open.discard(folder)

    def _make_room(self) -> None:
        """Delete the oldest that have ended; open ones count as full."""
        ended = sorted(set(self._folder.glob("session_*")) - self._open)
        sizes = [sum(file.stat().st_size for file in each.iterdir()) for each in ended]
        left = self._max_bytes - self._each * len(self._open) - sum(sizes)
        for folder, size in zip(ended, sizes, strict=True):
            if left >= 0:
                return
            shutil.rmtree(folder)
            left += size


@contextmanager
def _logging(recorder: AbstractContextManager[None]) -> Iterator[None]:
    """A recording whose end raises nothing."""
    recorder.__enter__()
    try:
        yield
    finally:
        try:
            recorder.__exit__(None, None, None)
        except DiskError as error:
            _LOG.error("%s", error)
