"""`python -m vqbet_edge.training.demo prepare`, then `... drive POLICY`."""

import sys

import tyro

from vqbet_edge.cli import run
from vqbet_edge.training.demo.pipeline import Drive, Prepare, drive, prepare


def _main() -> None:
    config = tyro.cli(
        Prepare | Drive,
        prog="python -m vqbet_edge.training.demo",
        use_underscores=True,
    )
    match config:
        case Prepare():
            sys.stdout.write(f"{prepare(config)}\n")
        case Drive():
            drive(config)


run(_main)
