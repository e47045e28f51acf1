"""The life of one contender: a process of its own, so that memory and start-up are its own.

The job is a file; commands come on standard input, replies go to standard output.
"""

import gc
import os
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import psutil

from vqbet_bench import memory
from vqbet_bench.contenders import Contender, create_contender
from vqbet_bench.messages import (
    AllocationsCommand,
    AllocationsReply,
    Command,
    Failure,
    Job,
    MemoryCommand,
    MemoryReply,
    Ready,
    Reply,
    RoundCommand,
    RoundReply,
    StagesReply,
)
from vqbet_bench.observations import Pool
from vqbet_bench.results import Allocations
from vqbet_bench.timing import SystemClock, run_round

# Calls whose own peak is watched; watching costs more than counting.
WATCHED_CALLS = 500


def main() -> None:
    """Argument: the job's file."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    replies = _own_stdout()
    limit_processors(job.threads)
    try:
        for reply in _replies(job):
            replies.write(msgspec.json.encode(reply) + b"\n")
            replies.flush()
    except Exception as error:  # noqa: BLE001 - whatever a library raises is a reason to report
        reason = f"{type(error).__name__}: {error}"
        replies.write(msgspec.json.encode(Failure(reason[:2000])) + b"\n")
        replies.flush()


def _own_stdout() -> IO[bytes]:
    """Standard output for replies alone: what libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return channel


def limit_processors(threads: int) -> None:
    """Keep the process on so many processors, whatever its libraries make of it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _replies(job: Job) -> Iterator[Reply]:
    pool = Pool.load(job.pool)
    before = memory.Baseline.take()
    started = time.monotonic()
    contender = create_contender(job, pool)
    contender.act(contender.prepare(0))
    now = time.monotonic()
    yield Ready(start_up=now - job.started, load=now - started, details=contender.details)
    for line in sys.stdin.buffer:
        match msgspec.json.decode(line, type=Command):
            case RoundCommand() as command:
                yield RoundReply(run_round(contender, command, SystemClock()))
            case MemoryCommand():
                yield MemoryReply(before.now(pool.size))
            case AllocationsCommand(calls):
                yield AllocationsReply(count_allocations(contender, calls))
            case command:
                yield StagesReply(_time_stages(contender, command.runs))


def count_allocations(contender: Contender, calls: int) -> Allocations:
    """What is allocated in steady state: nothing, if all is well."""
    contender.start(every=False)
    step = 0

    def act(count: int) -> None:
        nonlocal step
        for _ in range(count):
            contender.act(contender.prepare(step))
            step += 1

    act(10 * contender.chunk)
    process = psutil.Process()
    tracemalloc.start()
    act(10 * contender.chunk)  # tracemalloc itself settles
    gc.collect()
    net, resident = tracemalloc.get_traced_memory()[0], process.memory_info().rss
    act(calls)
    gc.collect()
    net, resident = (
        tracemalloc.get_traced_memory()[0] - net,
        process.memory_info().rss - resident,
    )
    largest, watched = 0, min(calls, WATCHED_CALLS)
    for _ in range(watched):
        observation = contender.prepare(step)
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        contender.act(observation)
        step += 1
        largest = max(largest, tracemalloc.get_traced_memory()[1] - held)
    tracemalloc.stop()
    return Allocations(calls, net, largest, watched, resident)


def _time_stages(contender: Contender, runs: int) -> dict[str, list[float]]:
    found = {}
    for name, launch in contender.stage_launches().items():
        for _ in range(50):
            launch()
        samples = found[name] = [0.0] * runs
        for run in range(runs):
            start = time.monotonic()
            launch()
            samples[run] = time.monotonic() - start
    return found
