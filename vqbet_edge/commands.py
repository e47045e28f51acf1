"""What every command of this package does around its work: errors, exit codes, interrupts."""

import sys
from collections.abc import Callable
from typing import NoReturn

from vqbet_edge.errors import DiskError, VQBeTEdgeError

INTERRUPTED = 130


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's body and exit.

    Exit codes: 0 ok, 2 usage (from the argument parser), 130 interrupted, otherwise the
    `exit_code` of the error. Notes and errors go to stderr.
    """
    from rich.console import Console  # noqa: PLC0415 - only commands need it

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        main()
    except VQBeTEdgeError as error:
        code = error.exit_code
        console.print(f"error: {error}", style="bold red", markup=False)
    except OSError as error:
        # The parts that know a better explanation raise it themselves.
        code = DiskError.exit_code
        console.print(f"error: {error}", style="bold red", markup=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.print("interrupted", style="bold red")
    else:
        code = 0
    sys.exit(code)
