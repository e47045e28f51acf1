"""A run: contenders in processes of their own, taking turns.

Rounds are interleaved: while one contender acts, the others wait, and whatever disturbs the
machine disturbs all of them.
"""

import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

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
    StagesCommand,
    StagesReply,
)
from vqbet_bench.power import PowerMeter
from vqbet_bench.results import MODES, Mode, Result, Round
from vqbet_bench.samples import SAMPLES_NEEDED
from vqbet_edge.errors import VQBeTEdgeError
from vqbet_edge.runtime.backends.child import module_command

# Enough re-plans over all rounds to name the 90th percentile.
_MIN_REPLANS = SAMPLES_NEEDED[90.0]
_STAGE_RUNS = 1000

_ReplyType = TypeVar("_ReplyType")
Progress = Callable[[str], None]


class ContenderError(VQBeTEdgeError):
    """A contender cannot be measured."""


class Plan(NamedTuple):
    """How to measure.

    Attributes:
        rate: ticks per second of the paced rounds.
        seconds: per contender and mode, spread over the rounds.
        rounds: turns of every contender in every mode.
        allocation_calls: calls over which bundles' allocations are counted; 0 leaves it out.
        modes: which of the modes.
    """

    rate: float
    seconds: float
    rounds: int
    allocation_calls: int
    modes: tuple[Mode, ...] = MODES

    def command(self, mode: Mode) -> RoundCommand:
        """One round of a mode."""
        return RoundCommand(
            mode, self.seconds / self.rounds, self.rate, math.ceil(_MIN_REPLANS / self.rounds)
        )


class Worker:
    """A contender's process, once it has acted for the first time."""

    def __init__(self, name: str, job: Job, folder: Path) -> None:
        """Start it and wait.

        Raises:
            ContenderError: it cannot be loaded.
        """
        self.name, self.job = name, job
        job_file = folder / f"{len(list(folder.iterdir()))}.json"
        self._log = job_file.with_suffix(".log")
        job_file.write_bytes(msgspec.json.encode(replace(job, started=time.monotonic())))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                module_command("vqbet_bench.worker", str(job_file)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": str(job.threads)},
            )
        try:
            self.ready = self._receive(Ready)
        except ContenderError:
            self.close()
            raise

    def ask(self, command: Command, reply: type[_ReplyType]) -> _ReplyType:
        """Send a command and wait for its reply.

        Raises:
            ContenderError: the contender failed.
        """
        if self._process.stdin is None:
            raise AssertionError("it was opened as a pipe")
        try:
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ContenderError(self._last_words()) from error
        return self._receive(reply)

    def _receive(self, kind: type[_ReplyType]) -> _ReplyType:
        if self._process.stdout is None:
            raise AssertionError("it was opened as a pipe")
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(self._last_words())
        reply = msgspec.json.decode(line, type=Reply)
        if isinstance(reply, Failure):
            raise ContenderError(reply.reason)
        if not isinstance(reply, kind):
            raise TypeError(f"expected {kind.__name__}, got {reply}")
        return reply

    def _last_words(self) -> str:
        code = self._process.wait()
        words = self._log.read_text(errors="replace")[-1000:].strip()
        return f"its process ended with exit code {code}: {words}"

    def close(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Session:
    """Workers that are measured together; one that fails drops out and the others go on.

    `folder` is there until `close`.
    """

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._workers: list[Worker] = []
        self._results: dict[str, Result] = {}
        self.failures: dict[str, str] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="vqbet-bench-")
        self.folder = Path(self._folder.name)
        self._meter = PowerMeter()

    def close(self) -> None:
        """End every worker."""
        self._meter.close()
        for worker in self._workers:
            worker.close()
        self._folder.cleanup()

    def start(self, name: str, job: Job) -> None:
        """Start a contender; the others are idle meanwhile, so that its start-up is its own."""
        self._progress(f"starting {name}")
        try:
            worker = Worker(name, job, self.folder)
        except ContenderError as error:
            self.failures[name] = str(error)
            return
        self._workers.append(worker)

    def run(self) -> list[Result]:
        """Measure everything."""
        rounds: dict[str, dict[Mode, list[Round]]] = {w.name: {} for w in self._workers}
        for mode in self._plan.modes:
            # Every worker's memory is read before any of them may load a second policy.
            if mode == "every":
                self._each(self._take_memory)
            for index in range(self._plan.rounds):
                self._progress(f"{mode.replace('_', ' ')}: round {index + 1}/{self._plan.rounds}")
                self._each(lambda worker, m=mode: self._play(worker, m, rounds))  # type: ignore[misc]
        self._each(lambda worker: self._finish(worker, rounds[worker.name]))
        return [self._results[w.name] for w in self._workers if w.name not in self.failures]

    def _each(self, work: Callable[[Worker], None]) -> None:
        for worker in self._workers:
            if worker.name in self.failures:
                continue
            try:
                work(worker)
            except ContenderError as error:
                self.failures[worker.name] = str(error)

    def _play(self, worker: Worker, mode: Mode, rounds: dict[str, dict[Mode, list[Round]]]) -> None:
        played = worker.ask(self._plan.command(mode), RoundReply).round
        watts = self._meter.mean(played.began, played.ended)
        rounds[worker.name].setdefault(mode, []).append(replace(played, watts=watts))

    def _take_memory(self, worker: Worker) -> None:
        self._results[worker.name] = Result(
            name=worker.name,
            kind=worker.job.kind,
            chunk=worker.job.chunk,
            details=worker.ready.details,
            start_up=worker.ready.start_up,
            load=worker.ready.load,
            rounds={},
            memory=worker.ask(MemoryCommand(), MemoryReply).memory,
        )

    def _finish(self, worker: Worker, rounds: dict[Mode, list[Round]]) -> None:
        if worker.name not in self._results:
            self._take_memory(worker)
        result = replace(self._results[worker.name], rounds=rounds)
        if worker.job.kind == "edge":
            stages = worker.ask(StagesCommand(_STAGE_RUNS), StagesReply).stages
            result = replace(result, stages=stages)
        if worker.job.kind == "edge" and self._plan.allocation_calls:
            self._progress(f"{worker.name}: counting allocations")
            command = AllocationsCommand(self._plan.allocation_calls)
            counted = worker.ask(command, AllocationsReply).allocations
            result = replace(result, allocations=counted)
        self._results[worker.name] = result


@contextmanager
def open_session(plan: Plan, progress: Progress) -> Iterator[Session]:
    """A session whose workers end with the block."""
    session = Session(plan, progress)
    try:
        yield session
    finally:
        session.close()
