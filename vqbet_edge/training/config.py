"""Configuration of a training run: every field is a flag of `vqbet-train` under its own name."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vqbet_edge.data import LeRobotDataset
from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.model.config import (
    ACTION_KEY,
    STATE_KEY,
    Feature,
    FeatureType,
    Hyperparameters,
    VQBeTConfig,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Hyperparameters):
    """One training run.

    Raises:
        UsageError: a value is out of its range.
    """

    # A LeRobot data set: a folder, or an id on the Hub.
    dataset: str
    # Folder of the run: checkpoints, metrics and curves go there.
    output: Path
    # Optimisation steps of both stages together.
    steps: int = 100_000
    # Windows per step, over all processes together.
    batch_size: int = 64
    # Of everything that is drawn at random.
    seed: int = 0
    # Go on from the run's last checkpoint.
    resume: bool = False

    # Learning rate of stage 2.
    optimizer_lr: float = 1e-4
    # Decay of Adam's moving averages, both stages.
    optimizer_betas: tuple[float, float] = (0.95, 0.999)
    # Adam's epsilon, both stages.
    optimizer_eps: float = 1e-8
    # Weight decay of stage 2.
    optimizer_weight_decay: float = 1e-6
    # Learning rate of stage 1.
    optimizer_vqvae_lr: float = 1e-3
    # Weight decay of stage 1.
    optimizer_vqvae_weight_decay: float = 1e-4
    # Gradients longer than this are shortened to it.
    optimizer_grad_clip_norm: float = 10.0
    # Steps in which stage 2's learning rate rises to its full height.
    scheduler_warmup_steps: int = 500

    # End stage 1 as soon as its reconstruction error stops falling.
    vqvae_early_stop: bool = False
    # Decay of the moving average of stage 2's weights that checkpoints then hold; 0 keeps none.
    ema_decay: float = 0.0
    # Precision that stage 2 computes in, beside the float32 weights.
    mixed_precision: Literal["no", "bf16"] = "no"
    # Compile stage 2 with torch.compile.
    compile: bool = False
    # Convolve in channels-last memory order.
    channels_last: bool = False

    # Share of the episodes that are kept for validation.
    validation_fraction: float = 0.05
    # Steps between validations.
    validate_every: int = 1000
    # Steps between lines of metrics.jsonl.
    log_every: int = 100
    # Steps between checkpoints.
    save_every: int = 5000
    # Keep decoded frames in this folder between runs, instead of in memory.
    frame_cache: Path | None = None
    # Write TensorBoard events as well.
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.n_vqvae_training_steps < self.steps:
            raise UsageError(
                f"--steps {self.steps} counts both stages and must be more than "
                f"--n_vqvae_training_steps {self.n_vqvae_training_steps}"
            )
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"--ema_decay must be in [0, 1), got {self.ema_decay}")

    @property
    def stage2_steps(self) -> int:
        """Optimisation steps of stage 2."""
        return self.steps - self.n_vqvae_training_steps

    def policy(self, dataset: LeRobotDataset) -> VQBeTConfig:
        """The architecture for a data set: its cameras, state and action.

        Raises:
            DatasetError: the data set has no camera, no state or no action.
            CheckpointError: the hyperparameters contradict each other or the images.
        """
        for key in (STATE_KEY, ACTION_KEY):
            if key not in dataset.features:
                raise DatasetError(
                    f"{dataset.info.root} has no '{key}'; its features are "
                    f"{', '.join(dataset.features)}"
                )
        images = {
            key: Feature(FeatureType.VISUAL, (3, *dataset.features[key].shape[:2]))
            for key in dataset.image_keys
        }
        state = Feature(FeatureType.STATE, dataset.features[STATE_KEY].shape)
        action = Feature(FeatureType.ACTION, dataset.features[ACTION_KEY].shape)
        chosen = {f.name: getattr(self, f.name) for f in fields(Hyperparameters)}
        return VQBeTConfig(
            input_features={**images, STATE_KEY: state},
            output_features={ACTION_KEY: action},
            **chosen,
        )

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON's types."""
        text = json.dumps(asdict(self), default=str)
        result: dict[str, Any] = json.loads(text)
        return result
