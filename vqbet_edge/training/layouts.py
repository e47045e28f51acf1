"""The three ways in which LeRobot has written a VQ-BeT checkpoint.

A: v0.1 (2024-06 to 2025-01), flat config, statistics among the weights.
B: v0.2 to 0.3, typed config, statistics among the weights.
C: v0.4 and later, typed config, statistics in the processors' state files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vqbet_edge.errors import CheckpointError
from vqbet_edge.training.config import (
    ACTION_KEY,
    STATE_KEY,
    Feature,
    FeatureType,
    NormalizationMode,
)
from vqbet_edge.training.normalization import Epsilon, Floats, Statistics

Json = dict[str, Any]
Arrays = Mapping[str, Floats]

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_BUFFER_EPSILON = Epsilon(1e-8, always=True)
# Steps of a processor that do not change what the policy computes from one observation.
_NEUTRAL_STEPS = {"to_batch_processor", "device_processor"}


class Era(str, Enum):
    """Which LeRobot wrote the checkpoint."""

    A = "A"
    B = "B"
    C = "C"


@dataclass(frozen=True)
class Normalization:
    """One feature's mode, statistics and guard against zero."""

    mode: NormalizationMode
    stats: Statistics = field(default_factory=dict)
    epsilon: Epsilon = _BUFFER_EPSILON


@dataclass(frozen=True)
class Layout:
    """What the files around the weights say.

    Attributes:
        renamed: the policy's key of an observation -> the key under which the robot passes it,
            where they differ.
        normalization: by the policy's key; absent means unchanged.
    """

    era: Era
    input_features: dict[str, Feature]
    output_features: dict[str, Feature]
    normalization: dict[str, Normalization]
    renamed: dict[str, str] = field(default_factory=dict)


def read_layout(directory: Path, config: Json, arrays: Arrays) -> Layout:
    """Recognise the era and read features and normalisation.

    Args:
        directory: the checkpoint's.
        config: the parsed config.json.
        arrays: the statistics found among the weights, by tensor name.
    """
    if "type" not in config and "input_shapes" in config:
        return _era_a(config, arrays)
    if config.get("type") != "vqbet":
        raise CheckpointError(
            f"config.json describes a policy of type {config.get('type')!r}, expected 'vqbet'; "
            "only VQ-BeT policies can be exported"
        )
    return (
        _era_c(directory, config) if (directory / PREPROCESSOR).exists() else _era_b(config, arrays)
    )


def _era_a(config: Json, arrays: Arrays) -> Layout:
    inputs = {key: _feature_by_name(key, shape) for key, shape in config["input_shapes"].items()}
    outputs = {
        key: Feature(FeatureType.ACTION, tuple(shape))
        for key, shape in config["output_shapes"].items()
    }
    modes = {
        key: NormalizationMode[mode.upper()]
        for name in ("input_normalization_modes", "output_normalization_modes")
        for key, mode in config.get(name, {}).items()
    }
    normalization = {key: _from_buffers(key, mode, arrays) for key, mode in modes.items()}
    return Layout(Era.A, inputs, outputs, normalization)


def _era_b(config: Json, arrays: Arrays) -> Layout:
    inputs, outputs = _typed_features(config)
    normalization = {
        key: _from_buffers(key, mode, arrays)
        for key, mode in _modes({**inputs, **outputs}, config["normalization_mapping"]).items()
    }
    return Layout(Era.B, inputs, outputs, normalization)


def _era_c(directory: Path, config: Json) -> Layout:
    inputs, outputs = _typed_features(config)
    before = _processor_steps(directory, PREPROCESSOR)
    after = _processor_steps(directory, POSTPROCESSOR)
    normalization = _from_step(directory, before.get("normalizer_processor"))
    trained_on = normalization.pop(ACTION_KEY, None)
    # The action's statistics are those that turn it back into the robot's units.
    action = _from_step(directory, after.get("unnormalizer_processor")).get(ACTION_KEY)
    if action is not None:
        normalization[ACTION_KEY] = action
    elif trained_on is not None and trained_on.mode is not NormalizationMode.IDENTITY:
        raise CheckpointError(
            f"{PREPROCESSOR} normalises the action, but {POSTPROCESSOR} has no "
            "'unnormalizer_processor' to turn it back; save the policy with both processors"
        )
    rename = before.get("rename_observations_processor", {}).get("config", {})
    renamed = {new: old for old, new in rename.get("rename_map", {}).items() if new in inputs}
    return Layout(Era.C, inputs, outputs, normalization, renamed)


def _feature_by_name(key: str, shape: list[int]) -> Feature:
    if key == STATE_KEY:
        return Feature(FeatureType.STATE, tuple(shape))
    if key.startswith("observation.image"):
        return Feature(FeatureType.VISUAL, tuple(shape))
    raise CheckpointError(f"input '{key}' is neither a camera nor '{STATE_KEY}'")


def _typed_features(config: Json) -> tuple[dict[str, Feature], dict[str, Feature]]:
    inputs, outputs = (
        {key: _typed_feature(key, spec) for key, spec in config[name].items()}
        for name in ("input_features", "output_features")
    )
    return inputs, outputs


def _typed_feature(key: str, spec: Json) -> Feature:
    names = [kind.value for kind in FeatureType]
    if spec["type"] not in names:
        raise CheckpointError(
            f"feature '{key}' is of type {spec['type']!r}; VQ-BeT uses {', '.join(names)}"
        )
    return Feature(FeatureType(spec["type"]), tuple(spec["shape"]))


def _modes(features: dict[str, Feature], mapping: Json) -> dict[str, NormalizationMode]:
    return {key: _mode(mapping.get(f.type.value, "IDENTITY")) for key, f in features.items()}


def _mode(name: str) -> NormalizationMode:
    if name not in NormalizationMode.__members__:
        raise CheckpointError(
            f"normalisation mode {name!r} is unknown; VQ-BeT uses "
            f"{', '.join(NormalizationMode.__members__)}"
        )
    return NormalizationMode[name]


def _from_buffers(key: str, mode: NormalizationMode, arrays: Arrays) -> Normalization:
    # LeRobot replaced dots by underscores; the way back would be ambiguous.
    owner = "unnormalize_outputs" if key == ACTION_KEY else "normalize_inputs"
    prefix = f"{owner}.buffer_{key.replace('.', '_')}."
    stats = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    return Normalization(mode, stats)


def _processor_steps(directory: Path, name: str) -> dict[str, Json]:
    """The steps of a processor by their registry name."""
    steps: dict[str, Json] = {}
    for step in read_json(directory / name).get("steps", []):
        kind = step.get("registry_name")
        known = {"normalizer_processor", "unnormalizer_processor", "rename_observations_processor"}
        if kind not in known | _NEUTRAL_STEPS:
            raise CheckpointError(
                f"{name} has the step {kind or step.get('class')!r}, which is unknown here: "
                "the exported policy would lack it; remove the step or apply it on the robot"
            )
        if kind in steps:
            raise CheckpointError(f"{name} has two steps '{kind}'; expected one")
        steps[kind] = step
    return steps


def _from_step(directory: Path, step: Json | None) -> dict[str, Normalization]:
    if step is None:
        return {}
    config = step.get("config", {})
    features = {key: _typed_feature(key, spec) for key, spec in config["features"].items()}
    only = config.get("normalize_observation_keys")
    stats = _state_file(directory, step["state_file"]) if "state_file" in step else {}
    epsilon = Epsilon(float(config.get("eps", 1e-8)), always=False)
    return {
        key: Normalization(mode, stats.get(key, {}), epsilon)
        for key, mode in _modes(features, config["norm_map"]).items()
        if only is None or key in only or key == ACTION_KEY
    }


def _state_file(directory: Path, name: str) -> dict[str, dict[str, Floats]]:
    path = directory / Path(name).name
    if not path.exists():
        raise CheckpointError(f"'{path}' is missing: the processor's statistics belong into it")
    stats: dict[str, dict[str, Floats]] = {}
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"'{path}' is no safetensors file: {error}; copy it again") from error
    for full_name, array in arrays.items():
        key, _, stat = full_name.rpartition(".")
        stats.setdefault(key, {})[stat] = np.asarray(array, np.float32)
    return stats


def read_json(path: Path) -> Json:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing or no JSON object.
    """
    if not path.exists():
        raise CheckpointError(
            f"'{path}' is missing; a LeRobot checkpoint has it next to model.safetensors"
        )
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' holds no JSON object")
    return value
