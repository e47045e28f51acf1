"""Waiting for a backend no longer than the robot can."""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent import futures

from vqbet_edge.backends.base import Floats
from vqbet_edge.errors import DeadlineError

Job = Callable[[], Floats]
_Jobs = queue.SimpleQueue[tuple[Job, "futures.Future[Floats]"] | None]


class Deadline:
    """Runs jobs one after the other on a thread, and waits for each until its deadline.

    A job that is late runs on, and the jobs after it wait their turn: nothing is skipped, so once
    the backend has caught up, all is as if it had never been late.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """`most` jobs may wait; a backend that is further behind has failed."""
        self._seconds, self._most = seconds, most
        self._jobs: _Jobs = queue.SimpleQueue()
        self._late: list[futures.Future[Floats]] = []
        weakref.finalize(self, self._jobs.put, None)
        # A daemon: a backend that never returns must not keep the program from ending.
        threading.Thread(target=_work, args=(self._jobs,), name="deadline", daemon=True).start()

    @property
    def seconds(self) -> float:
        """The deadline."""
        return self._seconds

    def admit(self) -> None:
        """Look at the jobs that were late.

        Raises:
            DeadlineError: too many still run.
            Exception: what one of them failed with.
        """
        while self._late and self._late[0].done():
            self._late.pop(0).result()
        if len(self._late) >= self._most:
            raise DeadlineError(
                f"the backend has not answered for {self._most} calls; stop the robot"
            )

    def run(self, job: Job, start: float) -> Floats | None:
        """The job's result, None when it takes longer than until `start` + `seconds`."""
        future: futures.Future[Floats] = futures.Future()
        self._jobs.put((job, future))
        remaining = start + self._seconds - time.monotonic()
        if futures.wait([future], max(0.0, remaining)).done:
            return future.result()
        self._late.append(future)
        return None

    def finish(self, job: Job) -> Floats:
        """The job's result, however long it takes."""
        future: futures.Future[Floats] = futures.Future()
        self._jobs.put((job, future))
        return future.result()

    def forget(self) -> None:
        """Forget the jobs that were late.

        Raises:
            DeadlineError: one still runs.
        """
        if not all(future.done() for future in self._late):
            raise DeadlineError(
                "the backend still works on a call that was late; wait for it, or load a new policy"
            )
        self._late.clear()


def _work(jobs: _Jobs) -> None:
    while (entry := jobs.get()) is not None:
        job, future = entry
        try:
            future.set_result(job())
        except BaseException as error:  # noqa: BLE001 - is raised where the result is asked for
            future.set_exception(error)
        # Until the next job comes, nothing may keep the policy alive.
        del entry, job, future
