"""Waiting for a backend no longer than the robot can."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from vqbet_edge.errors import DeadlineError
from vqbet_edge.runtime.worker import Backlog, Result, Worker

Finished = TypeVar("Finished")


class Deadline(Generic[Result]):
    """Runs jobs one after the other on a thread, and waits for each until its deadline.

    A job that is late runs on, and the jobs after it wait their turn: nothing is skipped, so once
    the backend has caught up, all is as if it had never been late.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """`most` jobs may wait; a backend that is further behind has failed."""
        self._seconds, self._most = seconds, most
        self._worker = Worker("vqbet-deadline", finish=True)
        self._late: Backlog[Result] = Backlog()
        self._failed = False

    def admit(self) -> None:
        """Look at the jobs that were late.

        Raises:
            DeadlineError: too many still ran, now or at an earlier call; only `clear` helps then.
            Exception: what one of them failed with.
        """
        self._late.check()
        self._failed |= len(self._late) >= self._most
        if self._failed:
            raise DeadlineError(
                f"the backend did not answer for {self._most} calls, so an observation is lost; "
                "stop the robot and call reset()"
            )

    def run(self, work: Callable[[], Result], start: float) -> Result | None:
        """The job's result, None when it takes longer than until `start` + `seconds`."""
        job = self._worker.submit(work)
        remaining = start + self._seconds - time.monotonic()
        done = False
        try:
            done = job.done(max(0.0, remaining))
        finally:  # an interrupt leaves the job running too
            if not done:
                self._late.add(job)
        return job.result() if done else None

    def finish(self, work: Callable[[], Finished]) -> Finished:
        """The job's result, however long it takes."""
        return self._worker.submit(work).result()

    @property
    def busy(self) -> bool:
        """Whether a job that was late still runs."""
        return self._late.running()

    def clear(self) -> None:
        """Forget the jobs that were late; none runs any more."""
        self._late.clear()
        self._failed = False
