"""The command `vqbet-export`."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_args

import msgspec
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from vqbet_edge import cli
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.manifest import TARGETS, Precision, Target
from vqbet_export.config import ExportConfig, Flag

WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True)
class Arguments(ExportConfig):
    """Export a VQ-BeT checkpoint as a bundle that acts without PyTorch, verified against it."""

    # The bundle to write; by default named after the checkpoint and the precision, here.
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # type: ignore[assignment]
    # Compute in float32; the default.
    fp32: Flag = False
    # Compute in float16, with normalisation and softmax in float32.
    fp16: Flag = False
    # Compute in int8 where it is exact enough; needs --calibration-data.
    int8: Flag = False
    # Whom the bundle is for; by default both, whose graphs lie side by side.
    target: Target | None = None
    # Upload the bundle with a model card to this repository of the Hugging Face Hub: user/name.
    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="USER/NAME")] = None
    # Make that repository private if it is created.
    private: Flag = False
    # Print the report as JSON.
    json: Flag = False

    def config(self) -> ExportConfig:
        """What they come to.

        Raises:
            UsageError: more than one precision.
        """
        asked = [name for name in get_args(Precision) if getattr(self, name)]
        if len(asked) > 1:
            flags = " and ".join(f"--{name}" for name in asked)
            raise UsageError(f"{flags} exclude each other; export once for each")
        values = {field.name: getattr(self, field.name) for field in fields(ExportConfig)}
        precision: Precision = asked[0] if asked else "fp32"
        values["precision"] = precision
        values["output"] = self.output or default_output(self.checkpoint, precision)
        values["targets"] = TARGETS if self.target is None else (self.target,)
        return ExportConfig(**values)


def main() -> None:
    """Entry point."""
    cli.run(_export)


def _export() -> None:
    arguments = cli.parse(Arguments, "vqbet-export")
    # Heavy, and not needed for --help.
    from vqbet_export.exporter import export  # noqa: PLC0415
    from vqbet_export.hub import check_repository, push  # noqa: PLC0415

    config = arguments.config()
    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    elif arguments.private:
        raise UsageError("--private is for --push-to-hub; add it")
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = export(config, progress=lambda text: status.update(f"{escape(text)} ..."))
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


def default_output(source: str, precision: Precision) -> Path:
    """`<name>-<precision>.bundle` in the working directory.

    The name is the file's, or the checkpoint's directory where files are all named alike; for
    `outputs/<run>/checkpoints/<step>/pretrained_model`, as training lays it out, it is the run.
    """
    path = Path(source)
    if path.suffix == ".pt":
        path = path.with_suffix("")
    directory = (path.parent if path.name in {WEIGHTS_NAME, "checkpoint"} else path).absolute()
    if directory.name == "pretrained_model" and len(directory.parents) > 2:
        directory = directory.parents[2]
    return Path(f"{directory.name or 'policy'}-{precision}.bundle")
