"""The command `vqbet-bench`."""

import os
import sys

import msgspec
from rich.console import Console
from rich.markdown import Markdown

from vqbet_bench.arguments import Arguments
from vqbet_edge import cli
from vqbet_edge.errors import BackendError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.extras import install_command

_RATE = 30.0


def main() -> None:
    """Entry point."""
    arguments = cli.parse(Arguments, "vqbet-bench")
    cli.run(lambda: _run(arguments))


def _run(arguments: Arguments) -> None:
    from vqbet_bench import report  # noqa: PLC0415 - not needed for --help
    from vqbet_bench.benchmark import benchmark  # noqa: PLC0415

    _check(arguments)
    rate = arguments.rate or Bundle.open(arguments.bundles[0]).manifest.fps or _RATE
    if arguments.serve:
        _serve(arguments, rate)
        return
    console = Console(stderr=True)
    with console.status("starting") as status:
        measured = benchmark(arguments, rate, lambda text: status.update(f"{text} ..."))
    for warning in report.warnings_of(measured):
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    for name, reason in measured.failures.items():
        console.print(f"not measured: {name}: {reason}", markup=False, highlight=False)
    text, data = report.markdown(measured), msgspec.json.encode(measured) + b"\n"
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "result.json").write_bytes(data)
        (arguments.output / "report.md").write_text(f"# vqbet-bench\n\n{text}")
    if arguments.json:
        sys.stdout.buffer.write(data)
    else:
        Console().print(Markdown(text))
    if not any(result.kind == "bundle" for result in measured.results):
        raise UsageError("no bundle could be measured; the reasons are above")


def _serve(arguments: Arguments, rate: float) -> None:
    try:
        from vqbet_bench.serving import measure_serving  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise BackendError(
            f"--serve needs '{error.name}', which is not installed; install it with: "
            f"{install_command('bench', 'serve', 'cpu')}"
        ) from error
    with Console(stderr=True).status("starting") as status:
        measure_serving(arguments, rate, lambda text: status.update(f"{text} ..."))


def _check(arguments: Arguments) -> None:
    if not arguments.bundles:
        raise UsageError("name at least one bundle; make one with: vqbet-export model.safetensors")
    for name in ("rate", "seconds", "rounds"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} must be more than 0")
    if arguments.record is not None and not arguments.record.is_dir():
        raise UsageError(f"--record takes a folder that exists; got '{arguments.record}'")
    processors = len(os.sched_getaffinity(0))
    if arguments.threads is not None and not 1 <= arguments.threads <= processors:
        raise UsageError(f"--threads must be 1 to {processors}, the processors that there are")
