"""What every command of this package does around its work: errors, exit codes, interrupts."""

import errno
import os
import signal
import sys
import threading
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

from vqbet_edge.errors import DiskError, VQBeTEdgeError

Arguments = TypeVar("Arguments")

# Shells report a program that a signal ended by 128 and the signal's number.
_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# What Python does at a signal unless it is told otherwise.
_USUAL: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
# Seconds until a signal whose exception was swallowed is sent again.
_SWALLOWED = 0.05
# Raised by a signal and on their way; who catches the last one forgets them.
_ON_THEIR_WAY: "set[weakref.ref[KeyboardInterrupt]]" = set()
# What a disk says without naming a file: no space, no quota, too large, read-only, broken.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, raised where SIGINT would raise KeyboardInterrupt."""


class _InterruptedError(KeyboardInterrupt):
    """SIGINT; Python's own class takes no weak references."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's body and exit; errors go to stderr.

    Exit codes: 0 ok, 2 usage (from the argument parser), 130 after SIGINT, 143 after SIGTERM,
    otherwise the `exit_code` of the error.
    """
    code = 0
    try:
        with _raising_on_signals():
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
def _raising_on_signals() -> Iterator[None]:
    """What is half done is cleaned up after SIGTERM as after SIGINT; an ignored one stays so."""
    own = [number for number, usual in _USUAL.items() if signal.getsignal(number) is usual]
    for number in own:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        _ON_THEIR_WAY.clear()
        for number in own:
            signal.signal(number, _USUAL[number])


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


def _raise(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise _interrupt(number)


def _interrupt(number: int) -> KeyboardInterrupt:
    """The exception of a signal, which comes again where something swallows it.

    Python drops what is raised in a destructor or a callback from C, of which an import is full.
    """
    error = TerminatedError() if number == signal.SIGTERM else _InterruptedError()

    def again(reference: "weakref.ref[KeyboardInterrupt]") -> None:
        _ON_THEIR_WAY.discard(reference)
        start_new_thread(send, ())

    def send() -> None:  # from a thread, lest it is delivered to the same callback
        time.sleep(_SWALLOWED)
        os.kill(os.getpid(), number)

    _ON_THEIR_WAY.add(weakref.ref(error, again))
    return error


def _default_in_child() -> None:
    _ON_THEIR_WAY.clear()
    for number, usual in _USUAL.items():
        if signal.getsignal(number) is _raise:
            signal.signal(number, usual)


# A forked child's signals are its own.
os.register_at_fork(after_in_child=_default_in_child)


def _fail(error: Exception, code: int) -> int:
    # What a file says may be quoted in the error, and terminals obey control characters.
    text = "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in str(error))
    sys.stderr.write(f"error: {text}\n")
    return code
