"""Python's end while threads compute.

Python does not wait for daemon threads. One that comes back from compiled code while Python ends is
ended on the spot, and C++ below it aborts the whole process. So Python's end waits for what
computes, and who calls after that is held where nothing but Python is below.
"""

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# A backend that never returns does not keep the program.
_PATIENCE_S = 2.0

#: Calls and jobs that may be in compiled code: their owners add and discard them.
RUNNING: set[object] = set()
# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=RUNNING.clear)

# The thread that ends Python, once it does.
_ending: int | None = None


@contextmanager
def computing() -> Iterator[None]:
    """A call that may be in compiled code; in a daemon thread it is never begun at Python's end."""
    call = object()
    RUNNING.add(call)
    try:
        # In this order: the end looks at what runs after it has said that it comes.
        if _ending is not None and _ending != threading.get_ident():
            _hold(call)
        yield
    except RuntimeError as error:
        # Executors and threads refuse to begin, some time before `_wait` is called.
        if "interpreter shutdown" not in str(error) or not threading.current_thread().daemon:
            raise
        _hold(call)
    finally:
        RUNNING.discard(call)


def _hold(call: object) -> None:
    RUNNING.discard(call)
    threading.Event().wait()


@atexit.register
def _wait() -> None:
    global _ending  # noqa: PLW0603 - there is one end
    _ending = threading.get_ident()
    end = time.monotonic() + _PATIENCE_S
    while RUNNING and time.monotonic() < end:
        time.sleep(0.001)
