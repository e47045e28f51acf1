"""A robot whose cameras differ in size, and a policy that was trained on both for a few steps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sizes import SMALL
from vqbet_export.exporter import ExportConfig, export
from workshop import once

from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.training.config import NormalizationMode, TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import Demonstration, write_dataset
from vqbet_edge.training.trainer import train

STATE, MEAN_STD = "observation.state", NormalizationMode.MEAN_STD
# The shapes of 720x1280 and 480x640, a twelfth and a tenth of the size; and one that is too small.
SCENE, WRIST, TINY = (f"observation.images.{name}" for name in ("scene", "wrist", "tiny"))
SIZES = {SCENE: (60, 108), TINY: (20, 40), WRIST: (48, 64)}
RESIZED = (24, 32)
EPISODES, STEPS = 8, 20


def demonstrations() -> list[Demonstration]:
    random = np.random.default_rng(0)
    return [_demonstrate(random) for _ in range(EPISODES)]


def _demonstrate(random: np.random.Generator) -> Demonstration:
    """A wave that every camera sees, and the states and actions that go with it."""
    phase = random.uniform(0, 6) + np.arange(STEPS) / 4
    moves = np.stack([np.sin(phase), np.cos(phase)], axis=1).astype(np.float32)
    views = {key: _view(size, phase, random) for key, size in SIZES.items()}
    return {**views, STATE: moves * 30, "action": moves}


def _view(size: tuple[int, int], phase: np.ndarray, random: np.random.Generator) -> np.ndarray:
    rows, columns = np.indices(size)
    wave = np.sin(phase[:, None, None] + rows / 9 + columns / random.uniform(6, 12))
    levels = 128 + 100 * wave[..., None] * np.array([1, 0.5, -1])
    noise = random.integers(-20, 20, levels.shape)
    return (levels + noise).clip(0, 255).astype(np.uint8)


def config(data: Path, output: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "steps": 40,
        "n_vqvae_training_steps": 20,
        "batch_size": 8,
        **SMALL,
        "n_obs_steps": 3,
        "n_action_pred_token": 2,
        "action_chunk_size": 2,
        "resize_shape": RESIZED,
        "crop_shape": (22, 28),
        "use_group_norm": False,
        "normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), MEAN_STD),
        "vqvae_n_embed": 8,
        "vqvae_embedding_dim": 16,
        "vqvae_enc_hidden_dim": 16,
        "spatial_softmax_num_keypoints": 8,
        "offset_loss_weight": 10.0,
        "validation_fraction": 0.0,
    }
    return TrainConfig(dataset=str(data), output=output, **options | changes)


@dataclass(frozen=True)
class Trained:
    """The data, the policy's directory, and its bundles.

    Attributes:
        bundle: exports it in a precision, once.
    """

    data: Path
    checkpoint: Path
    bundle: Callable[[Precision], Path]

    def observations(self, episode: int = 0) -> list[dict[str, np.ndarray]]:
        """What the robot would pass along a demonstration."""
        arrays = LeRobotDataset.open(self.data).episode(episode, [SCENE, WRIST, STATE])
        return [{k: v[step] for k, v in arrays.items()} for step in range(STEPS)]


def prepare(root: Path) -> Trained:
    """Write the data and train, in a folder that all workers share."""
    data, checkpoint = root / "data", root / "run" / "checkpoints" / "last" / "pretrained_model"

    def teach() -> None:
        torch.set_num_threads(1)
        write_dataset(data, demonstrations(), fps=10, task="wave")
        train(config(data, root / "run"))

    def bundle(precision: Precision) -> Path:
        output = root / f"{precision}.bundle"
        options: dict[str, Any] = {
            "verify_steps": 32,
            "verify_data": str(data),
            "calibration_data": str(data) if precision == "int8" else None,
            "calibration_steps": 128,
        }
        return once(
            output, lambda: export(ExportConfig(str(checkpoint), output, precision, **options))
        )

    once(root, teach)
    return Trained(data, checkpoint, bundle)
