"""What a forked process must not free: the threads that freeing waits for stayed behind."""

import ctypes
import os
import weakref

_KEPT: "weakref.WeakSet[object]" = weakref.WeakSet()
_HELD: list[list[object]] = []


def never_free_in_forks(owner: object) -> None:
    """Let `owner`, and all that it owns, outlive every process that is forked from this one.

    Libraries end their threads and give memory back in destructors. In a forked process, where
    the threads do not exist, ONNX Runtime's waits for ever; and garbage is collected at any time.
    """
    _KEPT.add(owner)


def _hold() -> None:
    # Before the fork: the child's first statement may already collect garbage.
    _HELD.append(list(_KEPT))


def _keep() -> None:
    for owner in _HELD.pop():
        # One reference too many, so that not even Python's end frees it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(before=_hold, after_in_parent=_HELD.pop, after_in_child=_keep)
