"""The command `vqbet-bench`."""

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vqbet_bench.arguments import Arguments
from vqbet_edge import cli
from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.runtime.bundle import Bundle

if TYPE_CHECKING:
    from vqbet_bench.report import Grid


def main() -> None:
    """Entry point."""
    arguments = cli.parse(Arguments, "vqbet-bench")
    cli.run(lambda: _run(arguments))


def _run(arguments: Arguments) -> None:
    from vqbet_bench import report, results  # noqa: PLC0415 - not needed for --help
    from vqbet_bench.benchmark import benchmark  # noqa: PLC0415

    _check(arguments)
    arguments = replace(arguments, rate=arguments.rate or _fps(arguments.bundles[0]))
    console = Console(stderr=True)
    if arguments.serve:
        from vqbet_bench.serving import measure_serving  # noqa: PLC0415

        with console.status("starting") as status:
            measure_serving(arguments, lambda text: status.update(f"{text} ..."))
        return
    with console.status("starting") as status:
        measured = benchmark(arguments, lambda text: status.update(f"{text} ..."))
    for warning in report.warnings_of(measured):
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    for name, reason in measured.failures.items():
        console.print(f"not measured: {name}: {reason}", markup=False, highlight=False)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "result.json").write_bytes(results.encode(measured))
        text = f"# vqbet-bench\n\n{report.markdown(measured)}"
        (arguments.output / "report.md").write_text(text)
    if arguments.json:
        sys.stdout.buffer.write(results.encode(measured))
    else:
        _show(report.grids(measured))
    if not any(result.kind == "bundle" for result in measured.results):
        raise UsageError("no bundle could be measured; the reasons are above")


def _fps(bundle: str) -> float | None:
    try:
        return Bundle.open(bundle).manifest.fps
    except VQBeTEdgeError:  # told with the others that could not be measured
        return None


def _check(arguments: Arguments) -> None:
    if not arguments.bundles:
        raise UsageError("name at least one bundle; make one with: vqbet-export model.safetensors")
    for name in ("rate", "seconds", "rounds"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} must be more than 0")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if arguments.record is not None and not arguments.record.is_dir():
        raise UsageError(f"--record takes a folder that exists; got '{arguments.record}'")
    if arguments.threads is not None and not 1 <= arguments.threads <= processors:
        raise UsageError(f"--threads must be 1 to {processors}, the processors that there are")


def _show(grids: list["Grid"]) -> None:
    console = Console()
    for grid in grids:
        table = Table(title=grid.title, title_justify="left")
        for index, column in enumerate(grid.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=not index)
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)
