"""Repeating a call and summing up how long it took."""

import time
from collections.abc import Callable

import numpy as np
from msgspec import Struct

WARM_UP_RUNS = 30


class Latency(Struct, frozen=True):
    """Milliseconds of one call: median, 99th percentile, worst, over so many runs."""

    p50: float
    p99: float
    worst: float
    runs: int


def measure(call: Callable[[], object], runs: int, prepare: Callable[[], object]) -> Latency:
    """Time `call`, with `prepare` before every run and outside the clock.

    Args:
        call: returns when its work is done, on the GPU too.
        runs: how many are counted, after the warm-up.
        prepare: brings everything to the state that `call` starts from.
    """
    seconds = np.empty(runs)
    for run in range(-WARM_UP_RUNS, runs):
        prepare()
        start = time.perf_counter()
        call()
        if run >= 0:
            seconds[run] = time.perf_counter() - start
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return Latency(float(p50), float(p99), float(seconds.max() * 1e3), runs)
