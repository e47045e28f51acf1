"""`vqbet-bench --serve`: robots on one server, beside policies in processes of their own."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import psutil

from vqbet_bench.arguments import Arguments
from vqbet_edge.errors import BackendError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.extras import install_command

if TYPE_CHECKING:
    from vqbet_bench.serve_load import Measured, Way

# Of the memory that is there, what the processes of one measurement may take.
_SHARE = 0.8


def measure_serving(arguments: Arguments, progress: Callable[[str], None]) -> None:
    """Measure, print and write what `--serve` asks for.

    Raises:
        BackendError: the extra is missing.
        UsageError: an argument does not go with it.
        VQBeTEdgeError: a server, or a policy, cannot start.
    """
    _check(arguments)
    try:
        from vqbet_bench.serve_load import table  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise BackendError(
            f"--serve needs '{error.name}', which is not installed; install it with: "
            f"{install_command('bench', 'serve', 'cpu')}"
        ) from error
    bundles = {source: Bundle.open(source).path for source in arguments.bundles}
    notes: list[str] = []
    results = list(_results(arguments, bundles, progress, notes))
    text = "\n\n".join([table(results).rstrip(), *notes]) + "\n"
    numbers = {"processors": os.cpu_count(), "rate": arguments.steps_a_second, "notes": notes}
    data = json.dumps({**numbers, "results": [asdict(each) for each in results]}, indent=1) + "\n"
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "serve.json").write_text(data)
        (arguments.output / "serve.md").write_text(f"# vqbet-bench --serve\n\n{text}")
    sys.stdout.write(data if arguments.json else text)


def _check(arguments: Arguments) -> None:
    if min(arguments.serve) < 1:
        raise UsageError("--serve takes numbers of robots, 1 or more")
    if len(arguments.backend) > 1 or "tensorrt_rtx" in arguments.backend:
        raise UsageError("--serve measures one of vqbet-serve's backends")


def _results(
    arguments: Arguments,
    bundles: Mapping[str, Path],
    progress: Callable[[str], None],
    notes: list[str],
) -> "Iterator[Measured]":
    from vqbet_bench.serve_load import Load, Way, measure  # noqa: PLC0415

    for source, bundle in bundles.items():
        name = Path(source).name
        load = Load(bundle, arguments.steps_a_second, arguments.seconds, arguments.backend[0])  # type: ignore[arg-type]
        per_process = 0.0
        for robots in sorted(arguments.serve):
            for way in get_args(Way):
                if _pointless(way, robots):
                    continue
                if way == "processes" and (note := _too_much(name, robots, per_process)):
                    notes.append(note)
                    continue
                progress(f"{name}: {robots} robots, {way}")
                measured = measure(load, way, robots)
                if way == "processes":
                    per_process = measured.memory_mb / robots
                yield replace(measured, bundle=name)


def _pointless(way: "Way", robots: int) -> bool:
    """One robot always runs alone."""
    return way == "server, each alone" and robots == 1


def _too_much(name: str, robots: int, per_process: float) -> str:
    """Why so many processes are not measured; empty if they are."""
    needed, there = robots * per_process, psutil.virtual_memory().available / 2**20
    if needed <= _SHARE * there:
        return ""
    return (
        f"{name}: {robots} processes would take about {needed:.0f} MiB, and {there:.0f} are "
        "available: not measured."
    )
