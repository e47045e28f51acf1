"""Training VQ-BeT in its two phases, and seeing how often it succeeds.

    from vqbet_edge.training import TrainConfig, load_checkpoint, train

The names resolve when they are first used: `vqbet_edge.training.dataset` needs no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqbet_edge.training.checkpoint import load_checkpoint
    from vqbet_edge.training.config import TrainConfig, VQBeTConfig
    from vqbet_edge.training.trainer import train

__all__ = ["TrainConfig", "VQBeTConfig", "load_checkpoint", "train"]

# Between operations, OpenMP's threads spin for the next one and burn the time of whatever else
# runs on the machine: with two busy cores a training step takes up to four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_MODULES = {
    "TrainConfig": "config",
    "VQBeTConfig": "config",
    "load_checkpoint": "checkpoint",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module has under that name
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
