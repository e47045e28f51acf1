"""What every command of this package does around its work: errors, exit codes, interrupts."""

import sys
from collections.abc import Callable
from typing import NoReturn

from vqbet_edge.errors import DiskError, UsageError, VQBeTEdgeError

INTERRUPTED = 130


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's body and exit; errors go to stderr.

    Exit codes: 0 ok, 2 usage (from the argument parser), 130 interrupted, otherwise the
    `exit_code` of the error.
    """
    code = 0
    try:
        main()
    except VQBeTEdgeError as error:
        code = _fail(error, error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in {"tyro", "rich"}:
            raise
        message = f"commands need '{error.name}'; type: pip install 'vqbet-edge[cli]'"
        code = _fail(UsageError(message), UsageError.exit_code)
    except OSError as error:
        # The parts that know a better explanation raise it themselves.
        code = _fail(error, DiskError.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = INTERRUPTED
    sys.exit(code)


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return code
