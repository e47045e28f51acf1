"""`vqbet-build`: the engines of a bundle for this device."""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import tyro
from rich.console import Console
from rich.table import Table

from vqbet_edge.cli import parse, run
from vqbet_edge.runtime.backends.cuda import create_cuda
from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.backends.tensorrt_module import Flavour, import_tensorrt
from vqbet_edge.runtime.bundle import Bundle
from vqbet_engines.boards import detect_board, load_board
from vqbet_engines.engines import EngineBuilder, EngineReport


@dataclass(frozen=True)
class BuildArguments:
    """Build a bundle's TensorRT engines for this device, prove them and keep them."""

    # What vqbet-export wrote: a directory or a Hub id (user/name, user/name@revision).
    bundle: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]

    # Board profile whose workspace is used; this board's by default.
    board: Annotated[str | None, tyro.conf.arg(metavar="BOARD")] = None

    # Scratch memory in MiB that the builder may use instead of the board's.
    workspace_mb: int | None = None

    # 0 builds fast, 5 searches longest for a fast engine.
    optimization_level: Literal[0, 1, 2, 3, 4, 5] = 3

    # Which TensorRT builds; `tensorrt` before `tensorrt_rtx` by default.
    flavour: Flavour | None = None

    # Build for these compute capabilities, such as sm86, without a GPU, and keep nothing: proves
    # that TensorRT takes the graphs. Needs tensorrt_rtx.
    ahead_of_time: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SM ...")] = ()

    # Build engines that are there already.
    force: bool = False

    # Print the report as JSON.
    json: bool = False


def build(arguments: BuildArguments) -> list[EngineReport]:
    """Carry out the command.

    Raises:
        BundleError, BackendError, DiskError, UsageError: as their names say.
        VerificationError: the engines do not compute the bundle's policy; none was kept.
    """
    bundle, ahead = Bundle.open(arguments.bundle), arguments.ahead_of_time
    bundle.check_target("tensorrt")
    board, workspace = arguments.board or detect_board(), arguments.workspace_mb
    if workspace is None and board is not None:
        workspace = load_board(board).workspace_mb
    tensorrt = import_tensorrt("tensorrt_rtx" if ahead else arguments.flavour)
    options = BuildOptions(workspace, arguments.optimization_level)
    builder = EngineBuilder(bundle, tensorrt, options, Console(stderr=True))
    if ahead:
        return [report for target in ahead for report in builder.build_ahead(target)]
    return builder.build_for(create_cuda(), force=arguments.force)


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    arguments = parse(BuildArguments, "vqbet-build")
    reports = build(arguments)
    if arguments.json:
        text = msgspec.json.format(msgspec.json.encode(reports), indent=2).decode()
        sys.stdout.write(text + "\n")
        return
    table = Table("stage", "precision", "target", "TensorRT", "build s", "MiB", "engine")
    for r in reports:
        seconds = f"{r.seconds:.1f}" if r.seconds else "was there"
        size, path = f"{r.size / 2**20:.1f}", r.path or "not kept"
        table.add_row(r.stage, r.precision, r.target, r.tensorrt, seconds, size, path)
    Console(markup=False).print(table)
