"""Sets of defaults for `vqbet-train --recipe NAME`, under the names of `TrainConfig`'s fields.

    TrainConfig(**RECIPES["small"], dataset="lerobot/pusht", output=Path("outputs/pusht"))

docs/training.md says what each value is worth, and what was measured.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from vqbet_edge.training.config import NormalizationMode

Recipe: TypeAlias = Literal["small"]

RECIPES: Mapping[Recipe, Mapping[str, Any]] = {
    "small": {
        # A small picture, and a network whose last map still has places to find keypoints in.
        "resize_shape": (64, 64),
        "crop_shape": (58, 58),
        "vision_backbone": "resnet10_small",
        "use_group_norm": False,
        "normalization_mapping": {
            "VISUAL": NormalizationMode.MEAN_STD,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        },
        # A policy that sees its own movement copies it.
        "n_obs_steps": 1,
        "n_action_pred_token": 1,
        # What a secondary code means depends on the primary one, whose residual it is.
        "sequentially_select": True,
        "gpt_n_layer": 4,
        "gpt_n_head": 4,
        "gpt_input_dim": 128,
        "gpt_hidden_dim": 128,
        "gpt_output_dim": 128,
        "gpt_block_size": 32,
        "vqvae_embedding_dim": 64,
        # At LeRobot's 10,000, offsets drown the codes for tens of thousands of steps.
        "offset_loss_weight": 30.0,
        "optimizer_lr": 1e-3,
        "scheduler_warmup_steps": 200,
        "ema_decay": 0.999,
        "batch_size": 64,
        "steps": 9_000,
        "n_vqvae_training_steps": 2_000,
    }
}
