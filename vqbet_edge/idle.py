"""Work that is done while the robot moves."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class IdleWorker:
    """Runs jobs one after the other on a thread of its own.

    The thread starts with the first job and ends with this object, or with Python.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "vqbet-idle")
        self._jobs: deque[Future[None]] = deque()

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after all earlier ones."""
        self._jobs.append(self._executor.submit(job))

    def check(self) -> None:
        """Raise what an ended job raised, without waiting for others."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Wait until no job is left; raise what one of them raised."""
        while self._jobs:
            self._jobs.popleft().result()

    def forget(self) -> None:
        """Wait until no job is left, whatever they raised."""
        while self._jobs:
            self._jobs.popleft().exception()
