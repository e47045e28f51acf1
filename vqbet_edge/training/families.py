"""Loading a checkpoint of whichever family."""

from pathlib import Path

from vqbet_edge.training.checkpoint import PICKLE_SUFFIXES, load_checkpoint
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_edge.training.nyu import load_nyu_checkpoint


def load_any(source: str) -> AnyCheckpoint:
    """Load a checkpoint of LeRobot, Robot Utility Models or Contact-Anchored Policies.

    Args:
        source: what `load_checkpoint` takes, or a file that `torch.save` wrote.

    Raises:
        CheckpointError, UsageError, HubError: as `load_checkpoint` and `load_nyu_checkpoint` do.
    """
    if Path(source).suffix in PICKLE_SUFFIXES:
        return load_nyu_checkpoint(source)
    return load_checkpoint(source)
