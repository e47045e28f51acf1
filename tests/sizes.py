"""A network that is quick to train, export and run, and a run of it."""

from pathlib import Path
from typing import Any

from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.metrics import Record, read_metrics

SMALL: dict[str, Any] = {
    "vision_backbone": "resnet10_small",
    "gpt_n_layer": 1,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 32,
    "gpt_input_dim": 32,
    "gpt_output_dim": 32,
}
_RUN: dict[str, Any] = {
    **SMALL,
    "steps": 16,
    "n_vqvae_training_steps": 8,
    "batch_size": 4,
    "n_obs_steps": 2,
    "crop_shape": (48, 48),
    "vqvae_embedding_dim": 32,
    "vqvae_enc_hidden_dim": 32,
    "scheduler_warmup_steps": 2,
    "log_every": 1,
    "save_every": 3,
    "validate_every": 4,
    "validation_fraction": 0.25,
    "ema_decay": 0.5,
}


def short_run(dataset: Path, output: Path, /, **changes: Any) -> TrainConfig:
    """Some steps of both phases."""
    return TrainConfig(**{"dataset": str(dataset), "output": output, **_RUN, **changes})


def losses(output: Path) -> list[Record]:
    """All that is in a run's metrics but how fast it went."""
    return [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] != "speed"]
