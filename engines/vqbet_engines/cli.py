"""Entry point of `vqbet-build`, which says so where its libraries are missing."""

from vqbet_edge.commands import import_command, run


def main() -> None:
    """Run `vqbet-build`."""
    run(lambda: import_command("vqbet_engines.build_command").main())
