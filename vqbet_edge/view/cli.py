"""`vqbet-view`: what a robot saw and decided, on one time line."""

import sys

from vqbet_edge.cli import run


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    # It may be missing, and is named then.
    import tyro  # noqa: PLC0415

    from vqbet_edge.view.command import ViewConfig, view  # noqa: PLC0415

    sys.stdout.write(f"{view(tyro.cli(ViewConfig, prog='vqbet-view'))}\n")
