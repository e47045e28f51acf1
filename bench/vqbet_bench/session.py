"""A run: policies in processes of their own, taking turns.

Rounds are interleaved: while one policy acts, the others wait, and whatever disturbs the machine
disturbs all of them.
"""

import os
import subprocess
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from vqbet_bench.policies import Job
from vqbet_bench.power import PowerMeter
from vqbet_bench.results import Mode, Result, Round
from vqbet_bench.timing import RoundPlan
from vqbet_bench.worker import Failure, Start
from vqbet_edge.errors import VQBeTEdgeError
from vqbet_edge.runtime.backends.child import module_command

Progress = Callable[[str], None]


class PolicyError(VQBeTEdgeError):
    """A policy cannot be measured."""


class Worker:
    """A policy's process, once it has acted for the first time.

    Neither `multiprocessing.Process` nor `python -m`: the former imports the main module of this
    program into the process that is measured, and both import from the current directory.

    Args:
        job: what it loads.
        log: file that takes what libraries print.

    Raises:
        PolicyError: it cannot be loaded.
    """

    def __init__(self, job: Job, log: Path) -> None:
        self.kind, self._log = job.kind, log
        self._connection, theirs = Pipe()
        with theirs, log.open("wb") as output:
            began = time.monotonic()
            self._process = subprocess.Popen(  # noqa: S603
                module_command("vqbet_bench.worker", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": str(job.threads)},
            )
        try:
            self.start: Start = self._exchange((job, began))
        except PolicyError:
            self.close()
            raise

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of `Measured` there.

        Raises:
            PolicyError: the policy failed.
        """
        return self._exchange((method, arguments))

    def _exchange(self, message: object) -> Any:
        try:
            self._connection.send(message)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            words = self._log.read_text(errors="replace")[-1000:].strip()
            raise PolicyError(f"its process ended with exit code {code}: {words}") from error
        if isinstance(answer, Failure):
            raise PolicyError(answer.reason)
        return answer

    def close(self) -> None:
        """End the process and wait for it."""
        self._connection.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Policies:
    """Policies that are measured together; one that fails drops out and the others go on.

    Args:
        folder: of the processes' logs.
        progress: takes a line on what is being done.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._workers: dict[str, Worker] = {}
        self.failures: dict[str, str] = {}
        self._meter = PowerMeter()

    def close(self) -> None:
        """End every process."""
        self._meter.close()
        for worker in self._workers.values():
            worker.close()

    def start(self, name: str, job: Job) -> None:
        """Start a policy; the others are idle meanwhile, so that its start-up is its own."""
        self._progress(f"starting {name}")
        try:
            self._workers[name] = Worker(job, self._folder / f"{len(self._workers)}.log")
        except PolicyError as error:
            self.failures[name] = str(error)

    def run(self, plans: list[RoundPlan], rounds: int) -> list[Result]:
        """Play so many rounds of every plan, one after the other, and measure memory."""
        played: dict[str, dict[Mode, list[Round]]] = {
            name: {plan.mode: [] for plan in plans} for name in self._workers
        }
        for plan in plans:
            for index in range(rounds):
                self._progress(f"{plan.mode.replace('_', ' ')}: round {index + 1}/{rounds}")
                for name, each in self._each("play", plan).items():
                    watts = self._meter.mean(each.began, each.ended)
                    played[name][plan.mode].append(replace(each, watts=watts))
        self._progress("memory")
        memories = self._each("memory")
        stages = self._each("stages_alone")
        return [
            Result(
                name=name,
                kind=self._workers[name].kind,
                **self._workers[name].start._asdict(),
                rounds=played[name],
                memory=memory,
                stages_alone=stages.get(name, {}),
            )
            for name, memory in memories.items()
            if name not in self.failures
        ]

    def _each(self, method: str, *arguments: object) -> dict[str, Any]:
        """Ask every policy that has not failed, one after the other."""
        answers = {}
        for name, worker in self._workers.items():
            if name in self.failures:
                continue
            try:
                answers[name] = worker.ask(method, *arguments)
            except PolicyError as error:
                self.failures[name] = str(error)
        return answers
