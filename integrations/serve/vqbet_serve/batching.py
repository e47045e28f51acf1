"""Robots whose steps fall together share runs of the transformer."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

from vqbet_edge.runtime.backends.base import Backend, GptRun, Window

_LOG = logging.getLogger(__name__)
# A backend that does not come back is not waited for longer.
_LONGEST_RUN_S = 5.0


class _Waiting(NamedTuple):
    """A robot that waits for its run."""

    window: Window
    since: float
    done: "Future[None]"

    def run_alone(self, part: GptRun) -> None:
        try:
            self.window.run_alone(part)
        except BaseException as error:  # noqa: BLE001 - raised where the robot waits
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


class Gatherer:
    """Gathers windows that need the same part of a prediction, and runs it for all of them.

    Each part has a thread of its own, for a prefill may take its time and a prediction may not.
    Whoever is the only robot is never handed over.

    Args:
        backend: theirs; it has `shared_parts`.
        wait_s: how long a robot waits for others, at most. It does so only while others are there
            that may come.
        count: is told how many windows shared a run, whenever some did.
    """

    def __init__(self, backend: Backend, wait_s: float, count: Callable[[int], None]) -> None:
        self._backend, self._wait_s, self._count = backend, wait_s, count
        self._changed = threading.Condition()
        self._waiting: dict[GptRun, list[_Waiting]] = {part: [] for part in backend.shared_parts}
        self._acting = 0
        self._closed = False
        self._warm_up()
        self._threads = [
            threading.Thread(target=self._work, args=(part,), name=f"vqbet-{part}", daemon=True)
            for part in self._waiting
        ]
        for thread in self._threads:
            thread.start()
        backend.run_shared = self._gather

    def close(self) -> None:
        """From now on every robot runs by itself."""
        self._backend.run_shared = None
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_LONGEST_RUN_S)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A robot acts: it may come to need what others wait for."""
        with self._changed:
            self._acting += 1
        try:
            yield
        finally:
            with self._changed:
                self._acting -= 1
                self._changed.notify_all()

    def _warm_up(self) -> None:
        """Arrays and first runs of every size; not while robots move."""
        two = [self._backend.create_window() for _ in range(2)]
        for part in self._waiting:
            self._backend.run_together(part, two)
        for window in two:
            window.close()

    def _robots(self) -> int:
        # The policy that robots' are made of has a window too.
        return len(self._backend.windows) - 1

    def _gather(self, window: Window, part: GptRun) -> None:
        """Run a part for a window, by whichever thread; see `Backend.run_shared`."""
        waiting = _Waiting(window, time.monotonic(), Future())
        with self._changed:
            handed_over = self._robots() > 1 and not self._closed
            if handed_over:
                self._waiting[part].append(waiting)
                self._changed.notify_all()
        if handed_over:
            waiting.done.result()
        else:
            window.run_alone(part)

    def _work(self, part: GptRun) -> None:
        while group := self._next_group(part):
            self._run(part, group)

    def _next_group(self, part: GptRun) -> list[_Waiting]:
        """Those who wait, and come while they do; none when there will be no more."""
        waiting = self._waiting[part]
        with self._changed:
            self._changed.wait_for(lambda: waiting or self._closed)
            if waiting:
                left = waiting[0].since + self._wait_s - time.monotonic()
                self._changed.wait_for(lambda: self._all_here(part), max(0.0, left))
            group = waiting[: self._backend.most_together]
            del waiting[: len(group)]
            return group

    def _all_here(self, part: GptRun) -> bool:
        coming = self._robots() if part == "prefill" else self._acting
        return self._closed or len(self._waiting[part]) >= min(coming, self._backend.most_together)

    def _run(self, part: GptRun, group: list[_Waiting]) -> None:
        if len(group) > 1:
            try:
                self._backend.run_together(part, [each.window for each in group])
            except Exception:  # noqa: BLE001 - whose fault it was shows when each runs alone
                _LOG.exception("%s robots could not share a run", len(group))
            else:
                self._count(len(group))
                for each in group:
                    each.done.set_result(None)
                return
        for each in group:
            each.run_alone(part)
