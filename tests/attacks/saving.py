"""A run's checkpoints without the run."""

from functools import cache
from pathlib import Path

import torch
from sizes import short_run

from vqbet_edge.training.checkpoints import Checkpoints, DataFacts, Progress
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings

PUSHT = Path(__file__).parents[1] / "data" / "pusht"


def config(output: Path, *, resume: bool = False) -> TrainConfig:
    """Of a tiny run."""
    return short_run(PUSHT, output, resume=resume)


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
    return Checkpoints(config(output, resume=resume), scalings(), DataFacts(10.0, {}))


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
