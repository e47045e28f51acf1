"""How every command of this package ends: its errors on standard error, its exit code."""

from collections.abc import Callable
from typing import NoReturn

from vqbet_edge.errors import VQBeTEdgeError

INTERRUPTED = 130


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit.

    An error of this package is one message on standard error and its exit code; any other
    exception is a bug and keeps its traceback.
    """
    from rich.console import Console  # noqa: PLC0415

    try:
        main()
    except VQBeTEdgeError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(0)
