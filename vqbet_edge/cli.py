"""What every command of this package does around its work: errors, exit codes, interrupts."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

from vqbet_edge.errors import DiskError, VQBeTEdgeError

Arguments = TypeVar("Arguments")

# Shells report a program that a signal ended by 128 and the signal's number.
_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# What a disk says without naming a file: no space, no quota, too large, read-only, broken.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, raised where SIGINT would raise KeyboardInterrupt."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's body and exit; errors go to stderr.

    Exit codes: 0 ok, 2 usage (from the argument parser), 130 after SIGINT, 143 after SIGTERM,
    otherwise the `exit_code` of the error.
    """
    code = 0
    try:
        with _raising_on_sigterm():
            main()
    except VQBeTEdgeError as error:
        code = _fail(error, error.exit_code)
    except OSError as error:
        # The parts that know a better explanation raise it themselves. Networks fail with errors
        # of this class too.
        disk = error.filename is not None or error.errno in _DISK
        code = _fail(error, DiskError.exit_code if disk else VQBeTEdgeError.exit_code)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write("interrupted\n")
        code = _TERMINATED if isinstance(interrupt, TerminatedError) else _INTERRUPTED
    sys.exit(code)


def parse(
    kind: type[Arguments],
    prog: str,
    *config: Any,  # noqa: ANN401
    default: Arguments | None = None,
) -> Arguments:
    """A command's arguments, by the dataclass that describes them and markers of `tyro.conf`."""
    import tyro  # noqa: PLC0415 - a robot may lack it, and is told so

    # Without a default it is typed as perhaps None, and never is.
    return cast("Arguments", tyro.cli(kind, prog=prog, config=config, default=default))


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """What is half done is cleaned up after SIGTERM as after SIGINT; an ignored one stays so."""
    own = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def keeping_signals() -> Iterator[list[KeyboardInterrupt]]:
    """Keep the first SIGINT or SIGTERM for whoever looks at the list; a second one stops at once.

    For work that must be finished first, and for calls out of foreign code (a simulator's drawing),
    which would swallow the exception.
    """
    received: list[KeyboardInterrupt] = []

    def keep(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(TerminatedError() if number == signal.SIGTERM else KeyboardInterrupt())
        if len(received) > 1:
            raise received[-1]

    # Python delivers signals to the main thread only.
    own = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if own else ()
    before = {number: signal.signal(number, keep) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise TerminatedError


def _default_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# A forked child's signals are its own.
os.register_at_fork(after_in_child=_default_in_child)


def _fail(error: Exception, code: int) -> int:
    # What a file says may be quoted in the error, and terminals obey control characters.
    text = "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in str(error))
    sys.stderr.write(f"error: {text}\n")
    return code
