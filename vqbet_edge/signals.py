"""SIGINT and SIGTERM end a command in time, with the terminal as it was."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Shells report a program that a signal ended by 128 and the signal's number.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Seconds that cleaning up may take before the process ends all the same.
GRACE = 1.5
_SHOW_CURSOR = b"\x1b[?25h"


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, raised where SIGINT would raise KeyboardInterrupt."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """130 after SIGINT, 143 after SIGTERM."""
    number = signal.SIGTERM if isinstance(interrupt, TerminatedError) else signal.SIGINT
    return EXIT_CODES[number]


@contextmanager
def ending_in_time(grace: float | None = GRACE) -> Iterator[None]:
    """Raise KeyboardInterrupt or TerminatedError on a signal, and exit if that does not help.

    Python delivers a signal between two of its instructions, so a long call into a library, or a
    library that swallows exceptions, would hold it back. A thread ends the process then, unless
    this block has ended by itself; one that the signal ended still has the interpreter's end ahead.

    Args:
        grace: seconds from the signal until then; None leaves all to the main thread.
    """
    # Python allows handlers in the main thread only; an ignored signal stays ignored.
    main = threading.current_thread() is threading.main_thread()
    own = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, _terminate)
        os.register_at_fork(after_in_child=_forget)
    stop_watching = _watch(grace) if main and grace is not None else lambda: None
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if main:
            signal.set_wakeup_fd(-1)
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not interrupted:
            stop_watching()


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise TerminatedError


def _forget() -> None:
    """A forked child's signals are its own; the pipe is its parent's."""
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(grace: float) -> Callable[[], None]:
    """Start the thread; the result ends it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    over = threading.Event()
    arguments = reading, over, grace
    threading.Thread(target=_wait, args=arguments, name="signals", daemon=True).start()

    def stop() -> None:
        over.set()
        os.close(writing)

    return stop


def _wait(reading: int, over: threading.Event, grace: float) -> None:
    number = None
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while number not in EXIT_CODES:
            byte = pipe.read(1)
            if not byte:
                return
            number = byte[0]
    if over.wait(grace):
        return
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _SHOW_CURSOR)
    os._exit(EXIT_CODES[signal.Signals(number)])
