"""vqbet_edge: a trained VQ-BeT policy on a robot, without PyTorch.

from vqbet_edge import EdgePolicy

policy = EdgePolicy.load("pusht-fp16.bundle")
action = policy.act({"observation.image": frame, "observation.state": state})
"""

from vqbet_edge.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ConcurrentUseError,
    DatasetError,
    DeadlineError,
    DiskError,
    ForkError,
    HistoryError,
    NonFiniteError,
    ObservationError,
    StaleObservationError,
    UsageError,
    VerificationError,
    VQBeTEdgeError,
)
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.policy import EdgePolicy
from vqbet_edge.runtime.sampling import Decision

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "ConcurrentUseError",
    "DatasetError",
    "DeadlineError",
    "Decision",
    "DiskError",
    "EdgePolicy",
    "ForkError",
    "Guards",
    "HistoryError",
    "NonFiniteError",
    "ObservationError",
    "StaleObservationError",
    "UsageError",
    "VQBeTEdgeError",
    "VerificationError",
]
