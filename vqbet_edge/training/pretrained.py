"""A policy's directory as LeRobot 0.4 and later writes and reads it.

config.json                          architecture, features, optimiser settings
model.safetensors                    weights
policy_preprocessor.json             rename, batch, device, normalise
policy_postprocessor.json            un-normalise, device
policy_*_step_*.safetensors          their statistics, named <feature>.<statistic>
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch

from vqbet_edge.training.config import Feature, Hyperparameters, TrainConfig, VQBeTConfig
from vqbet_edge.training.files import write_bytes
from vqbet_edge.training.layouts import ABSOLUTE, RELATIVE
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import EPSILON, Floats, Scalings

# Where a policy's statistics are; the preprocessor has them once more.
STATISTICS_NAME = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
# The fields of our configuration that LeRobot's does not have: it refuses those it does not know.
_OWN_FIELDS = {"optimizer_grad_clip_norm"}
_DEVICE = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


def save_pretrained(
    directory: Path, network: VQBeT, config: TrainConfig, scalings: Scalings, fps: float
) -> None:
    """Write everything but the training state into an existing directory."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_bytes(directory / "model.safetensors", safetensors.torch.save(tensors))
    _write_json(directory / "config.json", _policy_json(network, config))
    _write_json(directory / "train_config.json", {**config.to_json(), "fps": fps})
    features = {**network.config.input_features, **network.config.output_features}
    stats = safetensors.numpy.save(statistics(scalings))
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        _DEVICE,
        *_relative(network.config, RELATIVE),
        _normalizer("normalizer_processor", features, config),
    ]
    after = [
        _normalizer("unnormalizer_processor", network.config.output_features, config),
        *_relative(network.config, ABSOLUTE),
        _DEVICE,
    ]
    _write_processor(directory, "policy_preprocessor", before, stats)
    _write_processor(directory, "policy_postprocessor", after, stats)


def statistics(scalings: Scalings) -> dict[str, Floats]:
    """What both processors' files hold, named <feature>.<statistic>."""
    return {
        f"{key}.{name}": np.ascontiguousarray(value)
        for key, stats in scalings.stats.items()
        for name, value in stats.items()
    }


def lerobots_objections(config: VQBeTConfig) -> list[str]:
    """Why LeRobot's own VQ-BeT will not load a policy; empty if it will."""
    found = []
    if len(config.image_keys) > 1:
        found.append(f"it takes one camera, this policy has {len(config.image_keys)}")
    if config.resize_shape is not None:
        found.append("it does not know resize_shape")
    if config.vision_backbone == "resnet10_small":
        found.append("it does not know the backbone resnet10_small")
    if config.use_relative_actions:
        found.append(
            "it does not know use_relative_actions, and would add a queued action to another state "
            "than the one it was predicted on"
        )
    return found


def _policy_json(network: VQBeT, config: TrainConfig) -> dict[str, Any]:
    everything = config.to_json()
    names = [f.name for f in fields(Hyperparameters)]
    names += [n for n in everything if n.startswith(("optimizer_", "scheduler_"))]
    chosen = {name: everything[name] for name in names if name not in _OWN_FIELDS}
    if chosen["resize_shape"] is None:
        del chosen["resize_shape"]
    if not chosen["use_relative_actions"]:
        del chosen["use_relative_actions"], chosen["relative_exclude_joints"]
    # The backbone's weights are in the checkpoint: loading it must download none.
    chosen["pretrained_backbone_weights"] = None
    return {
        "type": "vqbet",
        "input_features": _features_json(network.config.input_features),
        "output_features": _features_json(network.config.output_features),
        "device": "cpu",
        **chosen,
    }


def _features_json(features: Mapping[str, Feature]) -> dict[str, Any]:
    return {key: {"type": f.type.value, "shape": list(f.shape)} for key, f in features.items()}


def _normalizer(name: str, features: Mapping[str, Feature], config: TrainConfig) -> dict[str, Any]:
    norm_map = {kind: mode.value for kind, mode in config.normalization_mapping.items()}
    return {
        "registry_name": name,
        "config": {
            "eps": EPSILON.value,
            "features": _features_json(features),
            "norm_map": norm_map,
        },
    }


def _relative(config: VQBeTConfig, name: str) -> list[dict[str, Any]]:
    """One of LeRobot's pair of steps; none where actions are positions."""
    if not config.use_relative_actions:
        return []
    step: dict[str, Any] = {"enabled": True}
    if name == RELATIVE:
        step["exclude_joints"] = list(config.relative_exclude_joints)
        step["action_names"] = list(config.action_names) or None
    return [{"registry_name": name, "config": step}]


def _write_processor(directory: Path, name: str, steps: list[dict[str, Any]], stats: bytes) -> None:
    for index, step in enumerate(steps):
        if step["registry_name"].endswith("normalizer_processor"):
            step["state_file"] = f"{name}_step_{index}_{step['registry_name']}.safetensors"
            write_bytes(directory / step["state_file"], stats)
    _write_json(directory / f"{name}.json", {"name": name, "steps": steps})


def _write_json(path: Path, value: object) -> None:
    write_bytes(path, json.dumps(value, indent=4).encode())
