"""What every command of this package does around its work: errors, exit codes, interrupts."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vqbet_edge.errors import DiskError, UsageError, VQBeTEdgeError

INTERRUPTED = 130


def import_command(module: str) -> Any:  # noqa: ANN401 - a module
    """Import a command's module, or a library that only commands need.

    Raises:
        UsageError: tyro or rich, of the extra `cli`, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("tyro", "rich"):
            raise
        raise UsageError(
            f"expected the Python package {error.name} for this command, it is not installed; "
            "install it with: pip install 'vqbet-edge[cli]'"
        ) from error


def _say(text: str) -> None:
    """Print to standard error, in red where rich is installed."""
    try:
        from rich.console import Console  # noqa: PLC0415 - only commands need it
    except ModuleNotFoundError:
        sys.stderr.write(text + "\n")
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(text, style="bold red", markup=False)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's body and exit.

    Exit codes: 0 ok, 2 usage (from the argument parser), 130 interrupted, otherwise the
    `exit_code` of the error. Notes and errors go to stderr.
    """
    try:
        main()
    except VQBeTEdgeError as error:
        code = error.exit_code
        _say(f"error: {error}")
    except OSError as error:
        # The parts that know a better explanation raise it themselves.
        code = DiskError.exit_code
        _say(f"error: {error}")
    except KeyboardInterrupt:
        code = INTERRUPTED
        _say("interrupted")
    else:
        code = 0
    sys.exit(code)
