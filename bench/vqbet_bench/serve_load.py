"""How many robots a server drives: latency over loopback, beside a policy in a process each.

`vqbet-bench --serve N` is the command. A step is late when its action comes after the next
observation is due, or is missed because an earlier one was. Memory is the share that each process
has of all pages (PSS), of the server or of all processes together.
"""

import asyncio
import math
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier, Lock
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from vqbet_serve.frames import pack
from vqbet_serve.server import DEFAULT_WAIT_MS
from websockets.asyncio.client import connect

from vqbet_edge import EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import unpack_frames
from vqbet_edge.runtime.manifest import Manifest

# Steps before the measured ones: buffers are made, pages are touched.
_WARM_STEPS = 20
# Loading as many policies as there are robots, one after the other on a small machine.
_LOADING_S = 600.0
_ENDING_S = 5.0


Way: TypeAlias = Literal["server", "server, each alone", "processes"]


@dataclass(frozen=True)
class Load:
    """What to measure with.

    Attributes:
        bundle: its directory.
        rate: observations per second and robot.
        seconds: how long to measure.
        backend: who runs the graphs.
    """

    bundle: Path
    rate: float
    seconds: float
    backend: BackendName


class Paced(NamedTuple):
    """A robot's steps: seconds from when each was due to its action, and how many were missed."""

    seconds: list[float]
    missed: int


@dataclass(frozen=True)
class Measured:
    """One way of driving robots; latencies are of all robots together, in milliseconds.

    Attributes:
        bundle: its directory's name.
        way: one `server`, whose robots share runs; one that runs each alone; or `processes`, a
            policy in each.
        robots: how many.
        steps: measured ones.
        p50, p95, p99, worst: of the time from an observation's due moment to its action.
        late: share of the steps whose action came after the next observation was due, or never.
        memory_mb: PSS of the server, or of all processes, in 2**20 bytes.
    """

    bundle: str
    way: Way
    robots: int
    steps: int
    p50: float
    p95: float
    p99: float
    worst: float
    late: float
    memory_mb: float

    @classmethod
    def of(cls, load: Load, way: Way, robots: list[Paced], memory: float) -> "Measured":
        """Summarise what the robots measured."""
        period = 1 / load.rate
        seconds = np.concatenate([np.array(robot.seconds) for robot in robots])
        p50, p95, p99 = (float(1e3 * np.quantile(seconds, q)) for q in (0.5, 0.95, 0.99))
        missed = sum(robot.missed for robot in robots)
        late = float((seconds > period).sum() + missed) / (seconds.size + missed)
        worst = float(1e3 * seconds.max())
        name = load.bundle.name
        return cls(name, way, len(robots), seconds.size, p50, p95, p99, worst, late, memory)


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
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) / 1024


def measure(load: Load, way: Way, robots: int) -> Measured:
    """Drive so many robots.

    Raises:
        VQBeTEdgeError: the server, or a policy, cannot start.
    """
    match way:
        case "server":
            return _served(load, way, robots, DEFAULT_WAIT_MS)
        case "server, each alone":
            return _served(load, way, robots, 0.0)
        case "processes":
            return _in_processes(load, robots)


def _served(load: Load, way: Way, robots: int, batch_wait_ms: float) -> Measured:
    """Robots on one server, over loopback."""
    manifest = Bundle.open(load.bundle).manifest
    with _server(load, robots, batch_wait_ms) as (pid, url):
        driven = asyncio.run(_drive(url, manifest, robots, load.seconds, 1 / load.rate))
        return Measured.of(load, way, driven, pss_mb(pid))


@contextmanager
def _server(load: Load, robots: int, batch_wait_ms: float) -> Iterator[tuple[int, str]]:
    code = "from vqbet_serve.cli import main; main()"
    options = ["--port", "0", "--max-robots", str(robots), "--backend", load.backend]
    options += ["--batch-wait-ms", str(batch_wait_ms)]
    command = [sys.executable, "-c", code, str(load.bundle), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stderr is not None  # noqa: S101 - for the type checker
        text = ""
        for line in process.stderr:
            text += line
            if url := re.search(r"serving on (\S+)", line):
                break
        else:
            raise VQBeTEdgeError(f"the server did not start: {text}")
        try:
            yield process.pid, url[1]
        finally:
            process.terminate()


async def _drive(
    url: str, manifest: Manifest, robots: int, seconds: float, period: float
) -> list[Paced]:
    steps = round(seconds / period)

    async def robot(number: int) -> Paced:
        seen = observations(manifest, number)
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
            return await paced(act, steps, began[0] + period * number / robots, period)

    ready, go, began = asyncio.Semaphore(0), asyncio.Event(), [0.0]
    tasks = [asyncio.create_task(robot(number)) for number in range(robots)]
    for _ in range(robots):
        await ready.acquire()
    began[0] = time.monotonic()
    go.set()
    return await asyncio.gather(*tasks)


def _in_processes(load: Load, robots: int) -> Measured:
    """Robots with a policy each, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    # A policy that is being loaded takes more memory than one that acts.
    loading, loaded, done = context.Lock(), context.Barrier(robots), context.Barrier(robots + 1)
    workers, ends = [], []
    for number in range(robots):
        mine, theirs = context.Pipe(duplex=False)
        target = (load, number, robots, loading, loaded, done, theirs)
        workers.append(context.Process(target=_own_process, args=target))
        workers[-1].start()
        theirs.close()
        ends.append(mine)
    try:
        driven = [msgspec.msgpack.decode(data, type=Paced) for data in _received(ends)]
        memory = sum(pss_mb(worker.pid or 0) for worker in workers)
        done.wait(_LOADING_S)
        for worker in workers:
            worker.join(_ENDING_S)
    finally:
        for worker in workers:
            worker.kill()
    return Measured.of(load, "processes", driven, memory)


def _received(ends: list[Connection]) -> list[bytes]:
    """What every process sends; the others would wait for one that died."""
    received: dict[Connection, bytes] = {}
    while len(received) < len(ends):
        for end in wait([end for end in ends if end not in received]):
            assert isinstance(end, Connection)  # noqa: S101 - for the type checker
            try:
                received[end] = end.recv_bytes()
            except EOFError as error:
                raise VQBeTEdgeError(
                    f"one of {len(ends)} processes with a policy each ended before its time, "
                    "perhaps for want of memory; measure fewer with --serve"
                ) from error
    return [received[end] for end in ends]


def _own_process(
    load: Load,
    number: int,
    robots: int,
    loading: Lock,
    loaded: Barrier,
    done: Barrier,
    end: Connection,
) -> None:
    period = 1 / load.rate
    with loading:
        policy = EdgePolicy.load(load.bundle, load.backend)
    with policy:
        seen = observations(policy.manifest, number)

        async def act(step: int) -> None:
            del step
            policy.act(next(seen))

        asyncio.run(act(0))
        loaded.wait(_LOADING_S)
        start = time.monotonic() + period * number / robots
        steps = round(load.seconds / period)
        end.send_bytes(msgspec.msgpack.encode(asyncio.run(paced(act, steps, start, period))))
        # The others' memory is looked at while all are there.
        done.wait(_LOADING_S)


def table(results: list[Measured]) -> str:
    """The results in Markdown."""
    rows = ["| bundle | robots | | p50 ms | p95 ms | p99 ms | worst ms | late | memory MiB |"]
    rows.append("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    rows += [
        f"| {r.bundle} | {r.robots} | {r.way} | {r.p50:.1f} | {r.p95:.1f} | {r.p99:.1f} "
        f"| {r.worst:.1f} | {r.late:.1%} | {r.memory_mb:.0f} |"
        for r in results
    ]
    return "\n".join(rows) + "\n"
