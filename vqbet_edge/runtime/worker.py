"""Work on a thread of its own: what is prefetched while the robot moves, what has a deadline."""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

from vqbet_edge.runtime import ending

Result = TypeVar("Result")


class Job(Generic[Result]):
    """One piece of work and, later, its outcome.

    `concurrent.futures` has the same, but to hand over a job takes it three times as long.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work
        self._error: BaseException | None = None
        self._value: Result
        # Held until the work is done.
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Do the work; whatever it raises, SystemExit included, is kept for who waits."""
        # Kept, it would keep alive the policy that it belongs to.
        work, self._work = self._work, None
        assert work is not None  # noqa: S101 - jobs run once
        try:
            self._value = work()
        except BaseException as error:  # noqa: BLE001 - raised where the outcome is asked for
            self._error = error
        finally:
            self._running.release()

    def done(self, timeout: float = 0.0) -> bool:
        """Whether the work ends within so many seconds; negative waits for ever."""
        ended = self._running.acquire(timeout=timeout)
        if ended:
            self._running.release()
        return ended

    def result(self) -> Result:
        """Wait for the end; return what the work returned or raise what it raised."""
        self.done(-1.0)
        if self._error is not None:
            raise self._error
        return self._value


_Jobs: TypeAlias = "SimpleQueue[Job[Any] | None]"


class Worker:
    """Runs jobs one after the other on a thread, which starts with the first and ends with this.

    With `finish`, Python waits a moment at its end for the jobs, which may be in compiled code.
    """

    def __init__(self, name: str, *, finish: bool) -> None:
        self._name, self._finish = name, finish
        self._jobs: _Jobs = SimpleQueue()
        self._started = False

    def submit(self, work: Callable[[], Result]) -> Job[Result]:
        """Run `work` after all that was submitted before."""
        if not self._started:
            threading.Thread(target=_run, args=(self._jobs,), name=self._name, daemon=True).start()
            # At Python's end, jobs may be submitted still.
            weakref.finalize(self, self._jobs.put, None).atexit = False
            self._started = True
        job = Job(work)
        if self._finish:
            ending.RUNNING.add(job)
        self._jobs.put(job)
        return job


class Backlog(Generic[Result]):
    """Jobs whose outcome has not been asked for yet, the oldest first."""

    def __init__(self) -> None:
        self._jobs: deque[Job[Result]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job[Result]) -> None:
        """Keep a job."""
        self._jobs.append(job)

    def check(self) -> None:
        """Raise what an ended job raised, without waiting for others."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Wait until no job is left; raise what one of them raised."""
        while self._jobs:
            self._jobs[0].done(-1.0)
            self._jobs.popleft().result()

    def running(self, patience_s: float = 0.0) -> bool:
        """Whether a job has not ended; waits, as long as one ends every so many seconds."""
        return not all(job.done(patience_s) for job in self._jobs)

    def clear(self) -> None:
        """Forget the jobs, whatever they raised."""
        self._jobs.clear()


def _run(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        ending.RUNNING.discard(job)
        # Otherwise the last job lives until the next one comes.
        del job
