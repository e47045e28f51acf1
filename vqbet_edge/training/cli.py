"""`vqbet-train`: the command line is the configuration."""

import sys

from vqbet_edge.cli import parse, run
from vqbet_edge.training.config import TrainConfig


def main() -> None:
    """Entry point."""
    # The step is finished and saved first; a second signal ends it at once.
    run(_main)


def _main() -> None:
    config = parse(TrainConfig, "vqbet-train")
    from vqbet_edge.training.trainer import train  # noqa: PLC0415 - slow, not needed for --help

    sys.stdout.write(f"{train(config)}\n")
