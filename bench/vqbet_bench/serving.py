"""`vqbet-bench --serve`: robots on one server, beside a policy in a process each.

A step is late when its action comes after the next observation is due, or is missed because an
earlier one was. Memory is the share that each process has of all pages (PSS), of the server or of
all processes together.
"""

import asyncio
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier, Lock
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray
from vqbet_serve.frames import pack
from vqbet_serve.server import DEFAULT_WAIT_MS
from websockets.asyncio.client import connect

from vqbet_bench.arguments import Arguments
from vqbet_bench.machine import describe_machine
from vqbet_edge import EdgePolicy, VQBeTEdgeError
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import unpack_frames
from vqbet_edge.runtime.manifest import Manifest

# Steps before the measured ones: buffers are made, pages are touched.
_WARM_STEPS = 20
# Loading as many policies as there are robots, one after the other on a small machine.
_LOADING_S = 600.0
# Of the memory that is there, what the processes of one measurement may take.
_SHARE = 0.8
# Of the machine, what stands below the table.
_FACTS = ("processor", "vector units", "cores", "onnxruntime")

Way: TypeAlias = Literal["server", "server, each alone", "processes"]


@dataclass(frozen=True)
class Load:
    """What to measure with: a bundle, observations a second and robot, seconds, a backend."""

    bundle: Bundle
    rate: float
    seconds: float
    backend: Any

    @property
    def steps(self) -> int:
        """Per robot."""
        return round(self.seconds * self.rate)


class Driven(NamedTuple):
    """What robots measured, and of the server or all processes memory (2**20 bytes) and CPU time.

    The time is in seconds, of all the steps that were acted, those before the measured ones too.
    """

    robots: list["Paced"]
    memory_mb: float
    cpu_s: float


class Paced(NamedTuple):
    """A robot's steps: seconds from when each was due to its action, and how many were missed."""

    seconds: list[float]
    missed: int


def measure_serving(arguments: Arguments, rate: float, progress: Callable[[str], None]) -> None:
    """Measure, print and write what `--serve` asks for.

    Raises:
        UsageError: an argument does not go with it.
        VQBeTEdgeError: a server, or a policy, cannot start.
    """
    if min(arguments.serve) < 1:
        raise UsageError("--serve takes numbers of robots, 1 or more")
    if len(arguments.backend) > 1 or "tensorrt_rtx" in arguments.backend:
        raise UsageError("--serve measures one of vqbet-serve's backends")
    results: list[dict[str, Any]] = []
    notes: list[str] = []
    machine = describe_machine()
    for source in arguments.bundles:
        load = Load(Bundle.open(source), rate, arguments.seconds, arguments.backend[0])
        per_process = 0.0
        for robots in sorted(arguments.serve):
            for way in get_args(Way):
                if way == "server, each alone" and robots == 1:
                    continue
                if way == "processes" and (note := too_much(robots, per_process)):
                    notes.append(f"{Path(source).name}: {note}")
                    continue
                progress(f"{Path(source).name}: {robots} robots, {way}")
                driven = drive(load, way, robots)
                if way == "processes":
                    per_process = driven.memory_mb / robots
                what = {"bundle": Path(source).name, "way": way, "robots": robots}
                figures = summarized(driven.robots, 1 / rate)
                acted = figures["steps"] + robots * _WARM_STEPS
                results.append({
                    **what, **figures, "steps_per_s": figures["steps"] / load.seconds,
                    "memory_mb": driven.memory_mb, "cpu_ms": 1e3 * driven.cpu_s / acted,
                })  # fmt: skip
    known = (name for name in _FACTS if name in machine.facts)
    facts = ", ".join(f"{name} {machine.facts[name]}" for name in known)
    text = "\n\n".join([_table(results), f"{facts}.", *machine.warnings, *notes]) + "\n"
    numbers = {"machine": machine, "rate": rate, "notes": notes}
    encoded = msgspec.json.encode({**numbers, "results": results})
    data = msgspec.json.format(encoded, indent=1).decode() + "\n"
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "serve.json").write_text(data)
        (arguments.output / "serve.md").write_text(f"# vqbet-bench --serve\n\n{text}")
    sys.stdout.write(data if arguments.json else text)


def too_much(robots: int, per_process: float) -> str:
    """Why so many processes are not measured; empty if they are."""
    needed, there = robots * per_process, psutil.virtual_memory().available / 2**20
    if needed <= _SHARE * there:
        return ""
    return (
        f"{robots} processes would take about {needed:.0f} MiB, and {there:.0f} are available: "
        "not measured."
    )


def drive(load: Load, way: Way, robots: int) -> Driven:
    """Drive so many robots.

    Raises:
        VQBeTEdgeError: the server, or a policy, cannot start.
    """
    if way == "processes":
        return _in_processes(load, robots)
    with _server(load, robots, DEFAULT_WAIT_MS if way == "server" else 0.0) as (pid, url):
        before = _cpu_s(pid)
        driven = asyncio.run(_served(url, load, robots))
        return Driven(driven, pss_mb(pid), _cpu_s(pid) - before)


def summarized(robots: list[Paced], period: float) -> dict[str, Any]:
    """Of all robots together, by the names in serve.json.

    `p50`, `p95`, `p99` and `worst` are milliseconds from an observation's due moment to its action;
    `late` is the share of the steps whose action came after the next observation was due, or never.
    """
    seconds = np.concatenate([robot.seconds for robot in robots])
    missed = sum(robot.missed for robot in robots)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "worst": 1.0}
    return {
        "steps": seconds.size,
        **{name: float(1e3 * np.quantile(seconds, q)) for name, q in shares.items()},
        "late": float((seconds > period).sum() + missed) / (seconds.size + missed),
    }


def observations(manifest: Manifest, seed: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Random images, states of zero."""
    random = np.random.default_rng(seed)
    area = random.integers(0, 256, (8, len(manifest.image_keys), *manifest.frame_shape), np.uint8)
    state = np.zeros(manifest.state_dim, np.float32)
    while True:
        for frames in area:
            yield {**unpack_frames(frames, manifest.image_shapes), manifest.state_key: state}


async def paced(
    act: Callable[[int], Awaitable[None]], steps: int, start: float, period: float
) -> Paced:
    """Act once per period; a robot that is late goes on with the newest observation."""
    seconds, missed, step = [], 0, 0
    while step < steps + _WARM_STEPS:
        due = start + step * period
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await act(step)
        now = time.monotonic()
        following = max(step + 1, math.floor((now - start) / period))
        if step >= _WARM_STEPS:
            seconds.append(now - due)
        # A late step of the warm-up may miss measured ones.
        missed += max(0, following - max(step + 1, _WARM_STEPS))
        step = following
    return Paced(seconds, missed)


def pss_mb(pid: int) -> float:
    """A process's share of the pages that it uses, in 2**20 bytes."""
    return float(psutil.Process(pid).memory_full_info().pss) / 2**20


def _cpu_s(pid: int) -> float:
    """Seconds that a process has computed."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def _server(load: Load, robots: int, batch_wait_ms: float) -> Iterator[tuple[int, str]]:
    """Its process and address."""
    code = "from vqbet_serve.cli import main; main()"
    options = ["--port", "0", "--max-robots", str(robots), "--backend", load.backend]
    options += ["--batch-wait-ms", str(batch_wait_ms)]
    command = [sys.executable, "-c", code, str(load.bundle.path), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        text = ""
        for line in process.stderr or ():
            text += line
            if url := re.search(r"serving on (\S+)", line):
                break
        else:
            raise VQBeTEdgeError(f"the server did not start: {text}")
        try:
            yield process.pid, url[1]
        finally:
            process.terminate()


async def _served(url: str, load: Load, robots: int) -> list[Paced]:
    period = 1 / load.rate

    async def robot(number: int) -> Paced:
        seen = observations(load.bundle.manifest, number)
        frames = [pack({**next(seen), "session_id": str(number)}) for _ in range(8)]
        async with connect(url, compression=None, proxy=None) as connection:
            await connection.recv()

            async def act(step: int) -> None:
                await connection.send(frames[step % 8])
                answer = await connection.recv()
                if isinstance(answer, str):
                    raise VQBeTEdgeError(answer)

            await act(0)
            ready.release()
            await go.wait()
            # Robots do not see at the same moment.
            return await paced(act, load.steps, began[0] + period * number / robots, period)

    ready, go, began = asyncio.Semaphore(0), asyncio.Event(), [0.0]
    tasks = [asyncio.create_task(robot(number)) for number in range(robots)]
    for _ in range(robots):
        await ready.acquire()
    began[0] = time.monotonic()
    go.set()
    return await asyncio.gather(*tasks)


def _in_processes(load: Load, robots: int) -> Driven:
    """Robots with a policy each, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    # A policy that is being loaded takes more memory than one that acts.
    turns = context.Lock(), context.Barrier(robots)
    with ProcessPoolExecutor(robots, context, _take_turns, turns) as pool:
        alone = [
            pool.submit(_alone, str(load.bundle.path), load.backend, load.rate, load.steps, place)
            for place in range(robots)
        ]
        try:
            driven = [each.result() for each in alone]
        except BrokenProcessPool as error:
            raise VQBeTEdgeError(
                f"one of {robots} processes with a policy each ended before its time, perhaps for "
                "want of memory; measure fewer with --serve"
            ) from error
    paced_robots, memory, cpu = zip(*driven, strict=True)
    return Driven(list(paced_robots), sum(memory), sum(cpu))


_turns: tuple[Lock, Barrier]


def _take_turns(*turns: Any) -> None:
    global _turns  # noqa: PLW0603 - a process inherits its locks, and is told the rest
    _turns = turns


def _alone(
    bundle: str, backend: Any, rate: float, steps: int, place: int
) -> tuple[Paced, float, float]:
    """A robot in this process: its steps, its memory and the seconds that it computed."""
    loading, together = _turns
    with loading:
        policy = EdgePolicy.load(bundle, backend)
    with policy:
        seen = observations(policy.manifest, place)

        async def act(_step: int) -> None:
            policy.act(next(seen))

        asyncio.run(act(0))
        together.wait(_LOADING_S)
        start = time.monotonic() + place / (rate * together.parties)
        before = time.process_time()
        found = asyncio.run(paced(act, steps, start, 1 / rate))
        computed = time.process_time() - before
        together.wait(_LOADING_S)
        memory = pss_mb(os.getpid())
        # The others' memory is looked at while all are there.
        together.wait(_LOADING_S)
    return found, memory, computed


def _table(results: list[dict[str, Any]]) -> str:
    names = "bundle", "robots", "", "steps/s", "p50 ms", "p95 ms", "p99 ms", "worst ms", "late"
    rows = [f"| {' | '.join([*names, 'memory MiB', 'CPU ms/step'])} |"]
    rows.append("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    rows += [
        "| {bundle} | {robots} | {way} | {steps_per_s:.1f} | {p50:.1f} | {p95:.1f} | {p99:.1f} "
        "| {worst:.1f} | {late:.1%} | {memory_mb:.0f} | {cpu_ms:.1f} |".format(**each)
        for each in results
    ]
    return "\n".join(rows)
