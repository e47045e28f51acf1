"""Everything a user can get wrong, as exceptions.

Each message says what was expected, what came, and what to type next. A traceback of any other
kind is a bug of this package.
"""

from typing import ClassVar


class VQBeTEdgeError(Exception):
    """Base of every error that this package raises on purpose.

    `exit_code` is what the command-line tools return: 1 failed, 2 usage, 3 verification failed,
    4 bad or untrusted input, 5 disk, 6 backend missing.
    """

    exit_code: ClassVar[int] = 1


class UsageError(VQBeTEdgeError):
    """A call or command line that cannot be carried out as it stands."""

    exit_code = 2


class VerificationError(VQBeTEdgeError):
    """An exported graph does not compute the policy that it was exported from."""

    exit_code = 3


class CheckpointError(VQBeTEdgeError):
    """A checkpoint that is unknown, incomplete or not ready to be exported."""

    exit_code = 4


class DatasetError(VQBeTEdgeError):
    """A data set that is missing, corrupt or does not fit the policy."""

    exit_code = 4


class BundleError(VQBeTEdgeError):
    """A bundle that is missing, corrupt, tampered with or of another format version."""

    exit_code = 4


class DiskError(VQBeTEdgeError):
    """Reading or writing failed: no space, no permission, read-only."""

    exit_code = 5


class HubError(VQBeTEdgeError):
    """What is not on this machine could not be downloaded: no network, no access, no such name."""


class BackendError(VQBeTEdgeError):
    """The inference backend is missing or failed."""

    exit_code = 6


class ObservationError(VQBeTEdgeError):
    """An observation that does not fit the policy; the history is as before the call."""


class StaleObservationError(ObservationError):
    """An observation that is too old, came twice or out of order; the history is as before."""


class HistoryError(VQBeTEdgeError):
    """The history no longer shows what happened; `reset` begins a new one."""


class NonFiniteError(VQBeTEdgeError):
    """The network produced NaN or infinity, so no code may be chosen from it."""


class DeadlineError(VQBeTEdgeError):
    """The backend took longer than the robot can wait."""


class ForkError(VQBeTEdgeError):
    """A policy was used in a process that was forked after it had been loaded."""


class ConcurrentUseError(VQBeTEdgeError):
    """Two calls on one policy overlapped; each thread needs a policy of its own."""
