"""vqbet_edge: a trained VQ-BeT policy on a robot, without PyTorch.

from vqbet_edge import EdgePolicy

policy = EdgePolicy.load("pusht-fp16.bundle")
action = policy.act({"observation.image": frame, "observation.state": state})
"""

import os

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

# From 1.29 on, ONNX Runtime writes a device's id into the home and sends telemetry, unless this is
# set before it is imported. Every module of ours comes after this line, and child processes inherit
# it. What the user set holds, and a program that imported ONNX Runtime before has decided itself.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

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
