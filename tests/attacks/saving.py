"""A run's checkpoints without the run."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from sizes import SMALL

from vqbet_edge.training.checkpoints import Checkpoints, Progress
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings

PUSHT = Path(__file__).parents[1] / "data" / "pusht"
_TINY: dict[str, Any] = {
    **SMALL,
    "n_obs_steps": 2,
    "crop_shape": (48, 48),
    "vqvae_embedding_dim": 32,
    "vqvae_enc_hidden_dim": 32,
}


def config(output: Path, *, resume: bool = False) -> TrainConfig:
    """Of a tiny run."""
    return TrainConfig(dataset=str(PUSHT), output=output, resume=resume, **_TINY)


@cache
def dataset() -> LeRobotDataset:
    """Four episodes of PushT."""
    return LeRobotDataset.open(PUSHT)


@cache
def scalings() -> Scalings:
    """Of those episodes."""
    return Scalings.of(dataset(), config(Path()).policy(dataset()))


def checkpoints(output: Path, *, resume: bool = False) -> Checkpoints:
    """Those of a tiny run."""
    return Checkpoints(config(output, resume=resume), scalings(), 10.0)


@cache
def network() -> VQBeT:
    """An untrained one whose code books count as trained."""
    torch.manual_seed(0)
    made = VQBeT(config(Path()).policy(dataset()))
    state = made.state_dict()
    for name, tensor in state.items():
        if name.endswith("discretized"):
            tensor.fill_(True)
    return made


def progress(step: int) -> Progress:
    """So far."""
    return Progress(step=step)
