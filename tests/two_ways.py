"""A task with exactly two ways, and a policy that is trained on it in seconds.

    y 0      |          All demonstrations go straight for `AHEAD` steps, seen by their state alone,
             |          then half of them left and half of them right, to the end.
            / \\
    y 1    /   \\
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sizes import SMALL

from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset.writer import Demonstration, write_dataset
from vqbet_edge.training.trainer import train

EPISODES, STEPS, AHEAD, CHUNK = 40, 12, 5, 2
# The chunks that differ between the two ways begin here, and the ways can be told from here on.
FORK = range(AHEAD - CHUNK + 1, AHEAD + 1)


def demonstrations() -> list[Demonstration]:
    return [_demonstrate(side) for side in (-1, 1) * (EPISODES // 2)]


def _demonstrate(side: int) -> Demonstration:
    actions = np.zeros((STEPS, 2), np.float32)
    actions[:, 1] = 1
    actions[AHEAD:, 0] = side
    states = np.concatenate([np.zeros((1, 2)), actions.cumsum(axis=0)[:-1]])
    frames = np.full((STEPS, 24, 24, 3), 128, np.uint8)
    return {
        "observation.image": frames,
        "observation.state": states.astype(np.float32),
        "action": actions,
    }


def config(root: Path, **changes: Any) -> TrainConfig:
    """Codes enough for every chunk of the data."""
    options: dict[str, Any] = {
        "steps": 800,
        "n_vqvae_training_steps": 300,
        "batch_size": 32,
        **SMALL,
        "n_obs_steps": 1,
        "n_action_pred_token": 1,
        "action_chunk_size": CHUNK,
        "crop_shape": None,
        "use_group_norm": False,
        "dropout": 0.0,
        "vqvae_n_embed": 8,
        "vqvae_embedding_dim": 16,
        "vqvae_enc_hidden_dim": 64,
        "spatial_softmax_num_keypoints": 4,
        "bet_softmax_temperature": 0.5,
        "offset_loss_weight": 1.0,
        "optimizer_lr": 3e-3,
        "scheduler_warmup_steps": 20,
        "validation_fraction": 0.0,
    }
    return TrainConfig(dataset=str(root / "data"), output=root / "run", **options | changes)


def prepare(root: Path, **changes: Any) -> Path:
    """Write the data, train, and return the policy's directory."""
    torch.set_num_threads(1)
    write_dataset(root / "data", demonstrations(), fps=10, task="pass")
    return train(config(root, **changes))
