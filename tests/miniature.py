"""The smallest bundle that has everything: for tests that load or run one many times."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sizes import SMALL
from vqbet_export import exporter
from vqbet_export.exporter import ExportConfig

from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import Feature, FeatureType, NormalizationMode, VQBeTConfig
from vqbet_edge.training.layouts import Layout, Normalization
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import EPSILON

STATE, IMAGE, SIZE = "observation.state", "observation.image", 24
# Smallest and largest action and state of its imagined training data, in the robot's units.
LOW = np.array([-2.0, 10.0], np.float32)
HIGH = np.array([2.0, 50.0], np.float32)

_FIELDS: dict[str, Any] = {
    **SMALL,
    "crop_shape": (20, 20),
    "vqvae_n_embed": 8,
    "vqvae_embedding_dim": 32,
    "vqvae_enc_hidden_dim": 32,
    "spatial_softmax_num_keypoints": 4,
    "pretrained_backbone_weights": None,
    "use_group_norm": False,
}


def checkpoint(
    size: tuple[int, int] = (SIZE, SIZE), cameras: Sequence[str] = (IMAGE,), **fields: Any
) -> Checkpoint:
    """An untrained policy of 24x24 pixels, or more, two states and two actions."""
    torch.manual_seed(0)
    config = VQBeTConfig(
        input_features={
            **{key: Feature(FeatureType.VISUAL, (3, *size)) for key in cameras},
            STATE: Feature(FeatureType.STATE, (2,)),
        },
        output_features={"action": Feature(FeatureType.ACTION, (2,))},
        **(_FIELDS | fields),
    )
    network = VQBeT(config).eval().requires_grad_(False)
    scaled = Normalization(NormalizationMode.MIN_MAX, {"min": LOW, "max": HIGH}, EPSILON)
    scalings = {STATE: scaled, "action": scaled}
    return Checkpoint(network, scalings, {}, Layout.V0_4, "miniature", "0" * 64)


def attentive(seed: int, **fields: Any) -> Checkpoint:
    """One in which every layer matters, as after training.

    Attention of an untrained transformer is the same for all tokens whatever the query is.
    """
    policy = checkpoint(**({"n_obs_steps": 3} | fields))
    torch.manual_seed(seed)
    for name, tensor in policy.network.named_parameters():
        if "transformer" in name and tensor.ndim == 2:
            torch.nn.init.normal_(tensor, std=0.3)
        elif tensor.ndim > 1:
            torch.nn.init.xavier_normal_(tensor)
        elif name.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.3)
    # Before training, keypoints hardly depend on the frame, and biases would hide what does.
    trunk = policy.network.vqbet
    for layer in (trunk.rgb_encoder.out, trunk.rgb_feature_projector[0]):
        layer.bias.zero_()
    trunk.policy.transformer["wte"].bias.zero_()  # type: ignore[union-attr]
    return policy


def write(
    path: Path,
    policy: Checkpoint | None = None,
    steps: int = 1,
    precision: Precision = "fp32",
    calibration: Path | None = None,
    **fields: Any,
) -> Path:
    """Export it, or another policy, verified on some steps; INT8 calibrates on a recording."""
    policy = policy or checkpoint(**fields)
    config = ExportConfig("miniature", path, precision, verify_steps=steps)
    if calibration is not None:
        config = replace(config, calibration_data=str(calibration), calibration_steps=96)
    with mock.patch.object(exporter, "load_any", return_value=policy):
        exporter.export(config)
    return path


def observation(
    random: np.random.Generator, cameras: Sequence[str] = (IMAGE,)
) -> dict[str, np.ndarray]:
    """A random one."""
    return {
        **{key: random.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for key in cameras},
        STATE: random.uniform(LOW, HIGH).astype(np.float32),
    }


def observations(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random ones, the same for the same seed."""
    random = np.random.default_rng(seed)
    return [observation(random) for _ in range(count)]
