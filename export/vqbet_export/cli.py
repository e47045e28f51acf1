"""The command `vqbet-export`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import msgspec
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from vqbet_edge import cli
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.manifest import TARGETS, ActionKind, Precision, Target
from vqbet_export.config import ExportConfig

WEIGHTS_NAME = "model.safetensors"
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class Arguments:
    """Export a VQ-BeT checkpoint as a bundle that acts without PyTorch, verified against it."""

    # A model.safetensors that LeRobot or vqbet-train wrote, its directory, or a Hub id.
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    # Compute in float32; the default.
    fp32: Flag = False
    # Compute in float16, with normalisation and softmax in float32.
    fp16: Flag = False
    # Compute in int8 where it is exact enough; needs --calibration-data.
    int8: Flag = False
    # What to calibrate INT8 on: a LeRobot data set (folder or Hub id), or a folder that
    # `policy.record` wrote on the robot.
    calibration_data: Annotated[str | None, tyro.conf.arg(metavar="DATASET")] = None
    # Observations to take from it.
    calibration_steps: int = 1024
    # Whom the bundle is for; by default both, whose graphs lie side by side.
    target: Target | None = None
    # The bundle to write; by default named after the checkpoint and the precision, here.
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    # A LeRobot data set (folder or Hub id) to verify on, besides random observations; by default
    # the one that the checkpoint names, if it is at hand.
    verify_data: Annotated[str | None, tyro.conf.arg(metavar="DATASET")] = None
    # Observations of each kind to verify on.
    verify_steps: int = 512
    # Observations a second of the demonstrations; by default what checkpoint and data sets say.
    fps: float | None = None
    # What each number of an action is, or one for all; by default what the data set's names say.
    action_kinds: tuple[ActionKind, ...] = ()
    # Take no frames that cameras saw as reference cases: the bundle then proves itself on noise.
    no_real_cases: Flag = False
    # Replace an existing bundle.
    force: Flag = False
    # Upload the bundle with a model card to this repository of the Hugging Face Hub: user/name.
    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="USER/NAME")] = None
    # Make that repository private if it is created.
    private: Flag = False
    # Print the report as JSON.
    json: Flag = False


def main() -> None:
    """Entry point."""
    cli.run(_export)


def _export() -> None:
    arguments = cli.parse(Arguments, "vqbet-export")
    # Heavy, and not needed for --help.
    from vqbet_export.exporter import export  # noqa: PLC0415
    from vqbet_export.hub import check_repository, push  # noqa: PLC0415

    precision = _precision(arguments)
    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    elif arguments.private:
        raise UsageError("--private is for --push-to-hub; add it")
    for name in ("verify_steps", "calibration_steps"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.fps is not None and not 0 < arguments.fps < float("inf"):
        raise UsageError(f"--fps takes observations a second, above 0; got {arguments.fps:g}")
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = export(
            ExportConfig(
                checkpoint=arguments.path,
                output=arguments.output or default_output(arguments.path, precision),
                precision=precision,
                verify_data=arguments.verify_data,
                verify_steps=arguments.verify_steps,
                force=arguments.force,
                calibration_data=arguments.calibration_data,
                calibration_steps=arguments.calibration_steps,
                targets=TARGETS if arguments.target is None else (arguments.target,),
                fps=arguments.fps,
                action_kinds=arguments.action_kinds,
                real_cases=not arguments.no_real_cases,
            ),
            progress=lambda text: status.update(f"{escape(text)} ..."),
        )
        if arguments.push_to_hub is not None:
            status.update("uploading ...")
            address = push(result.path, arguments.push_to_hub, private=arguments.private)
            console.print(f"uploaded to {escape(address)}")
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    if arguments.json:
        sys.stdout.buffer.write(msgspec.json.encode(result.report) + b"\n")
        return
    report = (result.path / "report.md").read_text()
    Console().print(Markdown(report), f"\n[bold]{escape(str(result.path))}[/bold]")


def _precision(arguments: Arguments) -> Precision:
    asked = [name for name in get_args(Precision) if getattr(arguments, name)]
    if len(asked) > 1:
        flags = " and ".join(f"--{name}" for name in asked)
        raise UsageError(f"{flags} exclude each other; export once for each")
    return asked[0] if asked else "fp32"


def default_output(source: str, precision: Precision) -> Path:
    """`<name>-<precision>.bundle` in the working directory.

    The name is the checkpoint's directory; for `outputs/<run>/checkpoints/<step>/pretrained_model`,
    as training lays it out, it is the run.
    """
    path = Path(source)
    directory = (path.parent if path.name == WEIGHTS_NAME else path).absolute()
    if directory.name == "pretrained_model" and len(directory.parents) > 2:
        directory = directory.parents[2]
    return Path(f"{directory.name or 'policy'}-{precision}.bundle")
