"""`vqbet-view`: what a robot saw and decided, on one time line."""

import sys

from vqbet_edge.cli import parse, run


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    # It may be missing, and is named then.

    from vqbet_edge.view.command import ViewConfig, view  # noqa: PLC0415

    sys.stdout.write(f"{view(parse(ViewConfig, 'vqbet-view'))}\n")
