"""Work that is done while the robot moves."""

import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias

_Jobs: TypeAlias = SimpleQueue[Callable[[], object] | None]
_Outcomes: TypeAlias = SimpleQueue[Exception | None]


class IdleWorker:
    """Runs jobs one after the other on a thread of its own.

    The thread starts with the first job and ends with this object, or with Python. An executor of
    the standard library does the same, but to hand it a job takes it three times as long.
    """

    def __init__(self) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._outcomes: _Outcomes = SimpleQueue()
        self._pending = 0
        self._started = False

    def submit(self, job: Callable[[], object]) -> None:
        """Run a job after all earlier ones."""
        if not self._started:
            self._start()
        self._pending += 1
        self._jobs.put(job)

    def check(self) -> None:
        """Raise what an ended job raised, without waiting for others."""
        while self._pending and not self._outcomes.empty():
            self._take()

    def wait(self) -> None:
        """Wait until no job is left; raise what one of them raised."""
        while self._pending:
            self._take()

    def forget(self) -> None:
        """Wait until no job is left, whatever they raised."""
        while self._pending:
            with contextlib.suppress(Exception):
                self._take()

    def _take(self) -> None:
        outcome = self._outcomes.get()
        self._pending -= 1
        if outcome is not None:
            raise outcome

    def _start(self) -> None:
        arguments = self._jobs, self._outcomes
        thread = threading.Thread(target=_work, args=arguments, name="vqbet-idle", daemon=True)
        thread.start()
        # A daemon that is still in a library when Python ends can crash there.
        weakref.finalize(self, _stop, self._jobs, thread)
        self._started = True


def _work(jobs: _Jobs, outcomes: _Outcomes) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 - raised where the result is waited for
            outcomes.put(error)
        else:
            outcomes.put(None)
        # Otherwise the last job, and the policy behind it, lives until the next one.
        del job


def _stop(jobs: _Jobs, thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()
