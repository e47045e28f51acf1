"""Policies side by side in one run: step times, memory, start-up.

    python -m vqbet_bench.side_by_side --checkpoint DIR --bundles A.bundle B.bundle \
        --dataset tests/data/pusht --output result.json

Every contender lives in its own process. Rounds are interleaved: while one runs, the others wait,
and whatever disturbs the machine disturbs all of them.
"""

import gc
import json
import multiprocessing
import os
import platform
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from rich.console import Console
from rich.table import Table

from vqbet_bench.contenders import CONTENDERS, IMAGE, STATE
from vqbet_edge import commands
from vqbet_edge.data import LeRobotDataset

WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Arguments:
    """Compare LeRobot in eager PyTorch with bundles of the same checkpoint on this CPU."""

    # The checkpoint that LeRobot runs.
    checkpoint: Path
    # Bundles that were exported from it.
    bundles: tuple[Path, ...]
    # A LeRobot data set with the observations to act on.
    dataset: Path
    # Where to write every sample as JSON.
    output: Path | None = None
    # Interleaved rounds.
    rounds: int = 7
    # Control steps per contender and round.
    steps: int = 100
    # Actions between two predictions.
    chunk: int = 5
    # Threads of every contender.
    threads: int = 2


@dataclass(frozen=True)
class Result:
    """What one contender needed. Seconds and bytes.

    Attributes:
        start_up: from the start of the process's work to its first action.
        memory: resident after the last round, of the whole process.
        replan: every re-planning step, round by round.
        queue: every step that returned a queued action, round by round.
    """

    name: str
    start_up: float
    memory: int
    replan: list[list[float]]
    queue: list[list[float]]


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments)
    commands.run(lambda: _run(arguments))


def _run(arguments: Arguments) -> None:
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    frames, states = _observations(arguments)
    console = Console(stderr=True)
    wanted = [("lerobot", arguments.checkpoint), *(("edge", b) for b in arguments.bundles)]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for kind, path in wanted:
        ours, theirs = context.Pipe()
        work = (theirs, kind, path, frames, states, arguments)
        processes.append(context.Process(target=_work, args=work, daemon=True))
        processes[-1].start()
        # Ready before the next one starts: start-up is timed undisturbed.
        pipes.append((f"{kind} {path.stem}", ours, ours.recv()))
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in pipes}
    for index in range(arguments.rounds):
        console.print(f"round {index + 1} of {arguments.rounds}")
        for name, pipe, _ in pipes:
            pipe.send("round")
            samples[name].append(pipe.recv())
    results = [_result(name, start_up, samples[name]) for name, _, start_up in pipes]
    for process in processes:
        process.terminate()
    _show(results)
    if arguments.output:
        arguments.output.write_text(json.dumps(_record(arguments, results), indent=1) + "\n")


def _observations(arguments: Arguments) -> tuple[Any, Any]:
    dataset = LeRobotDataset.open(arguments.dataset)
    return dataset.frames(IMAGE)[: arguments.steps], dataset.column(STATE)[: arguments.steps]


def _work(
    pipe: Connection, kind: str, path: Path, frames: Any, states: Any, arguments: Arguments
) -> None:
    """The life of one contender."""
    start = time.perf_counter()
    contender = CONTENDERS[kind](path, arguments.threads)
    observations = [contender.prepare(f, s) for f, s in zip(frames, states, strict=True)]
    contender.act(observations[0])
    pipe.send(time.perf_counter() - start)
    # From here on the first step of a chunk is always a multiple of `chunk`.
    for observation in observations[1 : arguments.chunk * (WARM_UP_STEPS // arguments.chunk)]:
        contender.act(observation)
    while pipe.recv() == "round":
        seconds = [_timed(contender, observation) for observation in observations]
        replan = seconds[:: arguments.chunk]
        queue = [s for i, s in enumerate(seconds) if i % arguments.chunk]
        memory = psutil.Process().memory_info().rss
        pipe.send({"replan": replan, "queue": queue, "memory": memory})


def _timed(contender: Any, observation: Any) -> float:
    start = time.perf_counter()
    contender.act(observation)
    return time.perf_counter() - start


def _result(name: str, start_up: float, rounds: list[dict[str, Any]]) -> Result:
    replan, queue = ([r[kind] for r in rounds] for kind in ("replan", "queue"))
    return Result(name, start_up, rounds[-1]["memory"], replan, queue)


def _show(results: list[Result]) -> None:
    """Milliseconds; the median over rounds of each round's own figure."""
    table = Table("policy", "re-plan p50", "faster", "worst step", "queue p50", "MB", "start-up s")
    first = _median_of(results[0].replan, np.median)
    for r in results:
        replan = _median_of(r.replan, np.median)
        worst = max(_median_of(r.replan, np.max), _median_of(r.queue, np.max))
        table.add_row(
            r.name, f"{replan:.2f}", f"{first / replan:.1f} x", f"{worst:.2f}",
            f"{_median_of(r.queue, np.median):.3f}", f"{r.memory / 1e6:.0f}", f"{r.start_up:.2f}",
        )  # fmt: skip
    Console().print(table)


def _median_of(rounds: list[list[float]], figure: Any) -> float:
    return float(np.median([figure(samples) for samples in rounds])) * 1e3


def _record(arguments: Arguments, results: list[Result]) -> dict[str, Any]:
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "garbage_collector": gc.isenabled(),
        },
        "threads": arguments.threads,
        "steps_per_round": arguments.steps,
        "results": [asdict(result) for result in results],
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
