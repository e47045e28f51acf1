"""The one way in which steps are timed: a single stream of calls, as MLPerf Inference has it."""

import gc
import time
from typing import Protocol

import psutil

from vqbet_bench.contenders import Contender
from vqbet_bench.messages import RoundCommand
from vqbet_bench.results import Round

WARM_UP_CALLS = 50
WARM_UP_SECONDS = 0.2


class Clock(Protocol):
    """Time as the loop sees it."""

    def now(self) -> float:
        """Seconds, never going back."""

    def sleep_until(self, moment: float) -> None:
        """Return at `moment` or later; at once when it has passed."""


class SystemClock:
    """The system's monotonic clock, which all processes share."""

    now = staticmethod(time.monotonic)

    def sleep_until(self, moment: float) -> None:
        """Sleep as a control loop does, without spinning."""
        remaining = moment - self.now()
        if remaining > 0:
            time.sleep(remaining)


class _Load:
    """Share of the processor that other processes take."""

    def __init__(self) -> None:
        self._process, self._cores = psutil.Process(), psutil.cpu_count() or 1
        self._busy, self._own = self._read()

    def _read(self) -> tuple[float, float]:
        times, own = psutil.cpu_times(), self._process.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        return busy - getattr(times, "guest", 0.0), own.user + own.system

    def others(self, seconds: float) -> float:
        """Since the start, which was so many seconds ago."""
        busy, own = self._read()
        taken = (busy - self._busy) - (own - self._own)
        return max(0.0, taken / (seconds * self._cores)) if seconds > 0 else 0.0


def run_round(contender: Contender, command: RoundCommand, clock: Clock) -> Round:
    """Let a contender act: warm up, then time every step.

    The history starts anew, so that step 0 predicts and every `chunk`-th after it. Preparing an
    observation is not timed. With `paced`, steps start on an absolute schedule of `rate` ticks a
    second; a step that is late delays the next ones, never the schedule.
    """
    every, paced = command.mode == "every", command.mode == "paced"
    chunk = 1 if every else contender.chunk
    contender.start(every=every)
    step = _warm_up(contender, chunk, clock)
    # Before the first paced chunk nobody waited, so that one is not counted.
    settled = step + (chunk if paced else 0)
    collections, load = _collections(), _Load()
    replan: list[float] = []
    queue: list[float] = []
    responses: list[float] = []
    stages: dict[str, list[float]] = {}
    period, tick = 1 / command.rate, clock.now()
    began = tick
    while step < settled or not _done(command, clock.now() - began, len(replan)):
        observation = contender.prepare(step)
        if paced:
            tick += period
            clock.sleep_until(tick)
        if step == settled:
            began = clock.now()
        start = clock.now()
        contender.act(observation)
        end = clock.now()
        planned = step % chunk == 0
        step += 1
        if step <= settled:
            continue
        (replan if planned else queue).append(end - start)
        if paced:
            responses.append(end - tick)
        if planned:
            for name, seconds in contender.stages().items():
                stages.setdefault(name, []).append(seconds)
    ended = clock.now()
    return Round(
        replan=replan,
        queue=queue,
        responses=responses,
        stages=stages,
        began=began,
        ended=ended,
        collections=_collections() - collections,
        disturbance=load.others(ended - began),
    )


def _done(command: RoundCommand, seconds: float, replans: int) -> bool:
    return seconds >= command.seconds and replans >= command.min_replans


def _warm_up(contender: Contender, chunk: int, clock: Clock) -> int:
    """Whole chunks: at least `WARM_UP_CALLS` calls and `WARM_UP_SECONDS`."""
    start, step = clock.now(), 0
    while step < WARM_UP_CALLS or step % chunk or clock.now() - start < WARM_UP_SECONDS:
        contender.act(contender.prepare(step))
        step += 1
    return step


def _collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())
