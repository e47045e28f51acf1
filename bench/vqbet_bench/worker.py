"""The life of one policy: a process of its own, so that memory and start-up are its own."""

import sys
import time
import timeit
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from vqbet_bench.machine import limit_processors
from vqbet_bench.memory import Baseline
from vqbet_bench.policies import Job, MeasuredBundle, load_policy
from vqbet_bench.results import Memory, Round
from vqbet_bench.timing import Clock, RoundPlan, run_round

# What one sibling adds is less than what a process gains and loses by itself.
_SIBLINGS = 8
_LAUNCHES = 1000


class Start(NamedTuple):
    """The first action is done."""

    start_up: float
    load: float
    details: dict[str, str]


class Failure(NamedTuple):
    """The policy cannot go on."""

    reason: str


class Measured:
    """A policy that has acted for the first time, and what the benchmark asks of it."""

    def __init__(self, job: Job, began: float) -> None:
        self._job, self._before = job, Baseline.take()
        loading = time.monotonic()
        self._policy = load_policy(job)
        self._policy.act(self._policy.prepare(0))
        now = time.monotonic()
        self.start = Start(now - began, now - loading, self._policy.details)

    def play(self, plan: RoundPlan) -> Round:
        """Act for one round."""
        with self._policy.recorded():
            return run_round(self._policy, plan, Clock())

    def memory(self) -> Memory:
        """What has been taken so far, and what one more robot on the same weights takes."""
        held = self._before.now()
        if not isinstance(self._policy, MeasuredBundle):
            return held
        # Kept until the end: what is freed would be taken again by the next.
        siblings = [self._policy.sibling(seed) for seed in range(_SIBLINGS)]
        for sibling in siblings:
            for step in range(2 * self._job.chunk):
                sibling.act(self._job.observations[step])
        more = self._before.now()
        gpu = None if held.gpu is None or more.gpu is None else more.gpu - held.gpu
        return replace(
            held,
            sibling=max(0, more.resident - held.resident) // _SIBLINGS,
            sibling_gpu=None if gpu is None else max(0, gpu) // _SIBLINGS,
        )

    def stages_alone(self) -> dict[str, float]:
        """Stage -> median seconds of runs of it alone; empty where `Round.stages` tells."""
        if not isinstance(self._policy, MeasuredBundle):
            return {}
        return {
            name: float(np.median(timeit.repeat(launch, number=1, repeat=_LAUNCHES)))
            for name, launch in self._policy.stage_launches().items()
        }


def main() -> None:
    """Argument: the descriptor of the connection to the benchmark.

    It sends the job, then methods of `Measured` with their arguments.
    """
    connection = Connection(int(sys.argv[1]))
    job, began = connection.recv()
    limit_processors(job.threads)
    try:
        measured = Measured(job, began)
        connection.send(measured.start)
        with suppress(EOFError):  # the benchmark has what it wants
            while True:
                method, arguments = connection.recv()
                connection.send(getattr(measured, method)(*arguments))
    except Exception as error:  # noqa: BLE001 - whatever a library raises is a reason to report
        connection.send(Failure(f"{type(error).__name__}: {error}"[:2000]))
