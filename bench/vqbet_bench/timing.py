"""The one way in which steps are timed: a single stream of calls, as MLPerf Inference has it."""

import time
from typing import NamedTuple

import psutil

from vqbet_bench.policies import Policy
from vqbet_bench.results import Mode, Round

WARM_UP_CALLS = 50
WARM_UP_SECONDS = 0.2


class RoundPlan(NamedTuple):
    """Act for at least `seconds`, and until `min_replans` chunks were predicted.

    Attributes:
        mode: way of running.
        seconds: at least.
        min_replans: at least.
        rate: ticks a second of a paced round.
    """

    mode: Mode
    seconds: float
    min_replans: int
    rate: float


class Clock:
    """The system's monotonic clock, which all processes share."""

    now = staticmethod(time.monotonic)

    def sleep_until(self, moment: float) -> None:
        """Sleep as a control loop does, without spinning; return at once when it has passed."""
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


def run_round(policy: Policy, plan: RoundPlan, clock: Clock) -> Round:
    """Let a policy act: warm up, then time every step.

    The history starts anew, so that step 0 predicts and every `chunk`-th after it. Preparing an
    observation is not timed. With `paced`, steps start on an absolute schedule of `rate` ticks a
    second; a step that is late delays the next ones, never the schedule.
    """
    every, paced = plan.mode == "every", plan.mode == "paced"
    chunk = 1 if every else policy.chunk
    policy.start(every=every)
    step = _warm_up(policy, chunk, clock)
    # Before the first paced chunk nobody waited, so that one is not counted.
    settled = step + (chunk if paced else 0)
    load = _Load()
    replan: list[float] = []
    queue: list[float] = []
    responses: list[float] = []
    stages: dict[str, list[float]] = {}
    period, tick = 1 / plan.rate, clock.now()
    began = tick
    while step < settled or not _done(plan, clock.now() - began, len(replan)):
        observation = policy.prepare(step)
        if paced:
            tick += period
            clock.sleep_until(tick)
        if step == settled:
            began = clock.now()
        start = clock.now()
        policy.act(observation)
        end = clock.now()
        planned = step % chunk == 0
        step += 1
        if step <= settled:
            continue
        (replan if planned else queue).append(end - start)
        if paced:
            responses.append(end - tick)
        if planned:
            for name, seconds in policy.stages().items():
                stages.setdefault(name, []).append(seconds)
    ended = clock.now()
    return Round(
        replan=replan,
        queue=queue,
        responses=responses,
        stages=stages,
        began=began,
        ended=ended,
        disturbance=load.others(ended - began),
    )


def _done(plan: RoundPlan, seconds: float, replans: int) -> bool:
    return seconds >= plan.seconds and replans >= plan.min_replans


def _warm_up(policy: Policy, chunk: int, clock: Clock) -> int:
    """Whole chunks: at least `WARM_UP_CALLS` calls and `WARM_UP_SECONDS`."""
    start, step = clock.now(), 0
    while step < WARM_UP_CALLS or step % chunk or clock.now() - start < WARM_UP_SECONDS:
        policy.act(policy.prepare(step))
        step += 1
    return step
