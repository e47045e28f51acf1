"""Entry point of `vqbet-build`."""

from vqbet_edge.cli import run


def main() -> None:
    """Run `vqbet-build`."""
    run(_main)


def _main() -> None:
    from vqbet_engines import build_command  # noqa: PLC0415 - imports tyro and rich

    build_command.main()
