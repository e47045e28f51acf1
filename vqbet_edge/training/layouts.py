"""The three layouts in which LeRobot has written a VQ-BeT checkpoint.

0.1 (2024-06 to 2025-01): flat config, statistics among the weights.
0.2-0.3 (until 2025-09): typed config, statistics among the weights.
0.4+: typed config, statistics in the processors' state files.

Of several outputs VQ-BeT predicts `action` alone, in LeRobot too; the others are left out.
"""

import json
from collections.abc import Iterable, Mapping
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
from vqbet_edge.training.normalization import EPSILON, Epsilon, Floats, Statistics

Json = dict[str, Any]
Arrays = Mapping[str, Floats]

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_BUFFER_EPSILON = Epsilon(1e-8, always=True)
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
_KNOWN_STEPS = {
    "normalizer_processor", "unnormalizer_processor", "rename_observations_processor", RELATIVE,
    ABSOLUTE,
}  # fmt: skip
# Steps of a processor that do not change what the policy computes from one observation.
_NEUTRAL_STEPS = {"to_batch_processor", "device_processor"}


class Layout(str, Enum):
    """Which releases of LeRobot write a checkpoint so."""

    V0_1 = "0.1"
    V0_2 = "0.2-0.3"
    V0_4 = "0.4+"


@dataclass(frozen=True)
class Normalization:
    """One feature's mode, statistics and guard against zero."""

    mode: NormalizationMode
    stats: Statistics = field(default_factory=dict)
    epsilon: Epsilon = _BUFFER_EPSILON


@dataclass(frozen=True)
class Description:
    """What the files around the weights say about a policy.

    Attributes:
        features: what the policy reads, in token order, and the action.
        normalization: by the policy's key; absent means unchanged.
        renamed: the policy's key of an observation -> the key under which the robot passes it,
            where they differ.
        relative: what the configuration says about relative actions.
    """

    layout: Layout
    features: dict[str, Feature]
    normalization: dict[str, Normalization]
    renamed: dict[str, str] = field(default_factory=dict)
    relative: Json = field(default_factory=dict)


def read_description(directory: Path, config: Json, arrays: Arrays) -> Description:
    """Recognise the layout and read features and normalisation.

    Args:
        directory: the checkpoint's.
        config: the parsed config.json.
        arrays: the statistics found among the weights, by tensor name.
    """
    if "type" not in config and "input_shapes" in config:
        return _layout_0_1(config, arrays)
    if "type" not in config:
        raise CheckpointError(
            f"'{directory / 'config.json'}' does not say of what type the policy is; if LeRobot's "
            'VQ-BeT wrote it, add the line "type": "vqbet", to it'
        )
    if config["type"] != "vqbet":
        raise CheckpointError(
            f"config.json describes a policy of type {config['type']!r}, expected 'vqbet'; "
            "only VQ-BeT policies can be exported"
        )
    if (directory / PREPROCESSOR).exists():
        return _layout_0_4(directory, config)
    return _layout_0_2(config, arrays)


def _layout_0_1(config: Json, arrays: Arrays) -> Description:
    features = _named_features(config)
    modes = {
        key: _mode(mode.upper())
        for name in ("input_normalization_modes", "output_normalization_modes")
        for key, mode in config.get(name, {}).items()
        if key in features
    }
    normalization = {key: _from_buffers(key, mode, arrays) for key, mode in modes.items()}
    return Description(Layout.V0_1, features, normalization)


def _layout_0_2(config: Json, arrays: Arrays) -> Description:
    features = _typed_features(config)
    modes = _modes(features, config["normalization_mapping"])
    normalization = {key: _from_buffers(key, mode, arrays) for key, mode in modes.items()}
    return Description(Layout.V0_2, features, normalization)


def _layout_0_4(directory: Path, config: Json) -> Description:
    features = _typed_features(config)
    before = _processor_steps(directory, PREPROCESSOR)
    after = _processor_steps(directory, POSTPROCESSOR)
    normalization = _from_step(directory, before.get("normalizer_processor"), features)
    trained_on = normalization.pop(ACTION_KEY, None)
    # The action's statistics are those that turn it back into the robot's units.
    action = _from_step(directory, after.get("unnormalizer_processor"), [ACTION_KEY])
    normalization |= action
    if not action and trained_on and trained_on.mode is not NormalizationMode.IDENTITY:
        raise CheckpointError(
            f"{PREPROCESSOR} normalises the action, but {POSTPROCESSOR} has no "
            "'unnormalizer_processor' to turn it back; save the policy with both processors"
        )
    rename = before.get("rename_observations_processor", {}).get("config", {})
    renamed = {new: old for old, new in rename.get("rename_map", {}).items() if new in features}
    relative = _relative(config, before, after)
    return Description(Layout.V0_4, features, normalization, renamed, relative)


def _relative(config: Json, before: Mapping[str, Json], after: Mapping[str, Json]) -> Json:
    """What a pair of steps says about relative actions, as fields of the configuration."""
    steps = before.get(RELATIVE), after.get(ABSOLUTE)
    there, back = (step is not None and bool(step["config"]["enabled"]) for step in steps)
    if not there == back == config.get("use_relative_actions", there):
        raise CheckpointError(
            f"config.json, the step {RELATIVE} of {PREPROCESSOR} and the step {ABSOLUTE} of "
            f"{POSTPROCESSOR} do not agree on whether actions are relative to the state; save the "
            "policy with both processors"
        )
    if not there:
        return {"use_relative_actions": False}
    _check_order(PREPROCESSOR, before, RELATIVE, "normalizer_processor")
    _check_order(POSTPROCESSOR, after, "unnormalizer_processor", ABSOLUTE)
    step = before[RELATIVE]["config"]
    return {
        "use_relative_actions": True,
        "relative_exclude_joints": tuple(step.get("exclude_joints") or ()),
        "action_names": tuple(step.get("action_names") or ()),
    }


def _check_order(name: str, steps: Mapping[str, Json], *order: str) -> None:
    found = [step for step in steps if step in order]
    if found != list(order):
        raise CheckpointError(
            f"{name}: expected the steps {' and '.join(order)}, in this order, got "
            f"{', '.join(steps)}; differences from the state are taken in the robot's units"
        )


def _named_features(config: Json) -> dict[str, Feature]:
    """Layout 0.1 has shapes only; what a feature is follows from its name."""
    specs = {
        key: {"type": "VISUAL" if key.startswith("observation.image") else "STATE", "shape": shape}
        for key, shape in config["input_shapes"].items()
    }
    outputs = {
        key: {"type": "ACTION", "shape": shape} for key, shape in config["output_shapes"].items()
    }
    return _typed_features({"input_features": specs, "output_features": outputs})


def _typed_features(config: Json) -> dict[str, Feature]:
    inputs, outputs = config["input_features"], config["output_features"]
    for key, spec in inputs.items():
        if spec["type"] != ("STATE" if key == STATE_KEY else "VISUAL"):
            raise CheckpointError(
                f"input feature '{key}' is of type {spec['type']!r}; VQ-BeT reads cameras and "
                f"'{STATE_KEY}' only. LeRobot cannot run the policy either, because it counts "
                "every input as a token; train it without this input"
            )
    specs = {**inputs, **{key: spec for key, spec in outputs.items() if key == ACTION_KEY}}
    return {
        key: Feature(FeatureType(spec["type"]), tuple(spec["shape"])) for key, spec in specs.items()
    }


def _modes(features: Mapping[str, Feature], mapping: Json) -> dict[str, NormalizationMode]:
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
        if kind not in _KNOWN_STEPS | _NEUTRAL_STEPS:
            raise CheckpointError(
                f"{name} has the step {kind or step.get('class')!r}, which is unknown here: "
                "the exported policy would lack it; remove the step or apply it on the robot"
            )
        if kind in steps:
            raise CheckpointError(f"{name} has two steps '{kind}'; expected one")
        steps[kind] = step
    return steps


def _from_step(directory: Path, step: Json | None, keys: Iterable[str]) -> dict[str, Normalization]:
    """What a step of a processor does to some features."""
    if step is None:
        return {}
    config = step.get("config", {})
    only = config.get("normalize_observation_keys")
    stats = _state_file(directory, step["state_file"]) if "state_file" in step else {}
    epsilon = Epsilon(float(config.get("eps", EPSILON.value)), always=False)
    return {
        key: Normalization(
            _mode(config["norm_map"].get(config["features"][key]["type"], "IDENTITY")),
            stats.get(key, {}),
            epsilon,
        )
        for key in keys
        if key in config["features"] and (only is None or key in only or key == ACTION_KEY)
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
