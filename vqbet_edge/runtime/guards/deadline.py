"""Waiting for a backend no longer than the robot can."""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent import futures
from typing import Any, Generic, TypeVar

from vqbet_edge.errors import DeadlineError

Result = TypeVar("Result")
_Jobs = queue.SimpleQueue[tuple[Callable[[], Any], "futures.Future[Any]"] | None]


class Deadline(Generic[Result]):
    """Runs jobs one after the other on a thread, and waits for each until its deadline.

    A job that is late runs on, and the jobs after it wait their turn: nothing is skipped, so once
    the backend has caught up, all is as if it had never been late.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """`most` jobs may wait; a backend that is further behind has failed."""
        self._seconds, self._most = seconds, most
        self._jobs: _Jobs = queue.SimpleQueue()
        self._late: list[futures.Future[Result]] = []
        self._failed = False
        weakref.finalize(self, self._jobs.put, None)
        # A daemon: a backend that never returns must not keep the program from ending.
        threading.Thread(target=_work, args=(self._jobs,), name="deadline", daemon=True).start()

    def admit(self) -> None:
        """Look at the jobs that were late.

        Raises:
            DeadlineError: too many still ran, now or at an earlier call; only `forget` mends it.
            Exception: what one of them failed with.
        """
        while self._late and self._late[0].done():
            self._late.pop(0).result()
        self._failed |= len(self._late) >= self._most
        if self._failed:
            raise DeadlineError(
                f"the backend did not answer for {self._most} calls, so an observation is lost; "
                "stop the robot and call reset()"
            )

    def run(self, job: Callable[[], Result], start: float) -> Result | None:
        """The job's result, None when it takes longer than until `start` + `seconds`."""
        future: futures.Future[Result] = futures.Future()
        self._jobs.put((job, future))
        remaining = start + self._seconds - time.monotonic()
        done = False
        try:
            done = bool(futures.wait([future], max(0.0, remaining)).done)
        finally:  # an interrupt leaves the job running too
            if not done:
                self._late.append(future)
        return future.result() if done else None

    def finish(self, job: Callable[[], Result]) -> Result:
        """The job's result, however long it takes."""
        future: futures.Future[Result] = futures.Future()
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
        self._failed = False


def _work(jobs: _Jobs) -> None:
    while (entry := jobs.get()) is not None:
        job, future = entry
        try:
            future.set_result(job())
        except BaseException as error:  # noqa: BLE001 - is raised where the result is asked for
            future.set_exception(error)
        # Until the next job comes, nothing may keep the policy alive.
        del entry, job, future
