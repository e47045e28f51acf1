"""What every command of this package does around its work: errors, exit codes, interrupts."""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

from vqbet_edge.errors import DiskError, HubError, UsageError, VQBeTEdgeError
from vqbet_edge.signals import GRACE, ending_in_time, exit_code


def run(main: Callable[[], None], grace: float | None = GRACE) -> NoReturn:
    """Run a command's body and exit; errors go to stderr.

    Exit codes: 0 ok, 2 usage (from the argument parser), 130 after SIGINT, 143 after SIGTERM,
    otherwise the `exit_code` of the error.

    Args:
        main: the body.
        grace: seconds that it has to end after a signal; None when it decides that itself.
    """
    code = 0
    try:
        with ending_in_time(grace):
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
        code = _fail(error, (DiskError if _of_a_file(error) else HubError).exit_code)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write("interrupted\n")
        code = exit_code(interrupt)
    sys.exit(code)


def _of_a_file(error: OSError) -> bool:
    """Whether it is about the disk; errors of the network are OSErrors too."""
    network = isinstance(error, (ConnectionError, TimeoutError))
    return error.filename is not None or (not network and error.errno in errno.errorcode)


def _fail(error: Exception, code: int) -> int:
    # What a file says may be quoted in the error, and terminals obey control characters.
    text = "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in str(error))
    sys.stderr.write(f"error: {text}\n")
    return code
