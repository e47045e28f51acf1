"""The three layouts in which LeRobot has written a VQ-BeT checkpoint, and writing the newest.

0.1 (2024-06 to 2025-01): flat config, statistics among the weights.
0.2-0.3 (until 2025-09): typed config, statistics among the weights.
0.4+: typed config, statistics in the processors' state files, named <feature>.<statistic>.

Of several outputs VQ-BeT predicts `action` alone, in LeRobot too; the others are left out.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from vqbet_edge.errors import CheckpointError
from vqbet_edge.runtime.lerobot_files import BATCH, CPU, RENAME, features_json, processor_json
from vqbet_edge.training.config import (
    ACTION_KEY,
    STATE_KEY,
    Feature,
    FeatureType,
    Hyperparameters,
    NormalizationMode,
    TrainConfig,
    VQBeTConfig,
)
from vqbet_edge.training.files import write_bytes
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import EPSILON, Epsilon, Floats, Scalings, Statistics

Json = dict[str, Any]
Arrays = Mapping[str, Floats]

CONFIG_NAME, TRAIN_CONFIG_NAME = "config.json", "train_config.json"
WEIGHTS_NAME = "model.safetensors"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
_BUFFER_EPSILON = Epsilon(1e-8, always=True)
_NORMALIZER, _UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
_RELATIVE, _ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
_RENAME = RENAME["registry_name"]
_KNOWN_STEPS = {
    _NORMALIZER, _UNNORMALIZER, _RELATIVE, _ABSOLUTE, _RENAME, BATCH["registry_name"],
    CPU["registry_name"],
}  # fmt: skip
# Where our policies' statistics are; the preprocessor has them once more.
STATISTICS_NAME = f"policy_postprocessor_step_0_{_UNNORMALIZER}.safetensors"
# The fields of our configuration that LeRobot's does not have: it refuses those it does not know.
_OWN_FIELDS = {"optimizer_grad_clip_norm"}


class Layout(str, Enum):
    """Who writes a checkpoint so: releases of LeRobot, or the code of a paper (see `nyu`)."""

    V0_1 = "0.1"
    V0_2 = "0.2-0.3"
    V0_4 = "0.4+"
    RUM = "Robot Utility Models"
    CAP = "Contact-Anchored Policies"


@dataclass(frozen=True)
class Normalization:
    """One feature's mode, statistics and guard against zero."""

    mode: NormalizationMode
    stats: Statistics = field(default_factory=dict)
    epsilon: Epsilon = _BUFFER_EPSILON


@dataclass(frozen=True)
class Description:
    """What the files around the weights say about a policy; see `Checkpoint`."""

    layout: Layout
    features: dict[str, Feature]  # what the policy reads, in token order, and the action
    normalization: dict[str, Normalization]
    renamed: dict[str, str] = field(default_factory=dict)
    relative: Json = field(default_factory=dict)  # fields of the configuration


def read_description(directory: Path, config: Json, arrays: Arrays) -> Description:
    """Recognise the layout; `arrays` are statistics that were among the weights, by tensor name."""
    if "type" not in config and "input_shapes" in config:
        named = {"input_normalization_modes", "output_normalization_modes"} & config.keys()
        modes = {key: mode.upper() for name in named for key, mode in config[name].items()}
        return _from_weights(Layout.V0_1, _typed_features(_with_types(config)), modes, arrays)
    if "type" not in config:
        raise CheckpointError(
            f"'{directory / CONFIG_NAME}' does not say of what type the policy is; if LeRobot's "
            'VQ-BeT wrote it, add the line "type": "vqbet", to it'
        )
    if config["type"] != "vqbet":
        raise CheckpointError(
            f"config.json describes a policy of type {config['type']!r}, expected 'vqbet'; "
            "only VQ-BeT policies can be exported"
        )
    if (directory / PREPROCESSOR).exists():
        return _layout_0_4(directory, config)
    features, mapping = _typed_features(config), config["normalization_mapping"]
    modes = {key: mapping.get(feature.type.value, "IDENTITY") for key, feature in features.items()}
    return _from_weights(Layout.V0_2, features, modes, arrays)


def _from_weights(
    layout: Layout, features: dict[str, Feature], modes: Mapping[str, str], arrays: Arrays
) -> Description:
    found = {}
    for key in filter(modes.__contains__, features):
        # LeRobot replaced dots by underscores; the way back would be ambiguous.
        owner = "unnormalize_outputs" if key == ACTION_KEY else "normalize_inputs"
        prefix = f"{owner}.buffer_{key.replace('.', '_')}."
        stats = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        found[key] = Normalization(_mode(modes[key]), stats)
    return Description(layout, features, found)


def _layout_0_4(directory: Path, config: Json) -> Description:
    features = _typed_features(config)
    before = _processor_steps(directory, PREPROCESSOR)
    after = _processor_steps(directory, POSTPROCESSOR)
    normalization = _from_step(directory, before.get(_NORMALIZER), features)
    trained_on = normalization.pop(ACTION_KEY, None)
    # The action's statistics are those that turn it back into the robot's units.
    action = _from_step(directory, after.get(_UNNORMALIZER), [ACTION_KEY])
    normalization |= action
    if not action and trained_on and trained_on.mode is not NormalizationMode.IDENTITY:
        raise CheckpointError(
            f"{PREPROCESSOR} normalises the action, but {POSTPROCESSOR} has no "
            f"'{_UNNORMALIZER}' to turn it back; save the policy with both processors"
        )
    rename = before.get(_RENAME, {}).get("config", {})
    renamed = {new: old for old, new in rename.get("rename_map", {}).items() if new in features}
    relative = _relative(config, before, after)
    return Description(Layout.V0_4, features, normalization, renamed, relative)


def _relative(config: Json, before: Mapping[str, Json], after: Mapping[str, Json]) -> Json:
    """What a pair of steps says about relative actions, as fields of the configuration."""
    steps = before.get(_RELATIVE), after.get(_ABSOLUTE)
    there, back = (step is not None and bool(step["config"]["enabled"]) for step in steps)
    if not there == back == config.get("use_relative_actions", there):
        raise CheckpointError(
            f"config.json, the step {_RELATIVE} of {PREPROCESSOR} and the step {_ABSOLUTE} of "
            f"{POSTPROCESSOR} do not agree on whether actions are relative to the state; save the "
            "policy with both processors"
        )
    if not there:
        return {"use_relative_actions": False}
    for name, found, order in (
        (PREPROCESSOR, before, [_RELATIVE, _NORMALIZER]),
        (POSTPROCESSOR, after, [_UNNORMALIZER, _ABSOLUTE]),
    ):
        if [step for step in found if step in order] != order:
            raise CheckpointError(
                f"{name}: expected the steps {' and '.join(order)}, in this order, got "
                f"{', '.join(found)}; differences from the state are taken in the robot's units"
            )
    step = before[_RELATIVE]["config"]
    return {
        "use_relative_actions": True,
        "relative_exclude_joints": tuple(step.get("exclude_joints") or ()),
        "action_names": tuple(step.get("action_names") or ()),
    }


def _with_types(config: Json) -> Json:
    """Layout 0.1 has shapes only; what a feature is follows from its name."""
    inputs = {
        key: {"type": "VISUAL" if key.startswith("observation.image") else "STATE", "shape": shape}
        for key, shape in config["input_shapes"].items()
    }
    outputs = {
        key: {"type": "ACTION", "shape": shape} for key, shape in config["output_shapes"].items()
    }
    return {"input_features": inputs, "output_features": outputs}


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


def _mode(name: str) -> NormalizationMode:
    if name not in NormalizationMode.__members__:
        raise CheckpointError(
            f"normalisation mode {name!r} is unknown; VQ-BeT uses "
            f"{', '.join(NormalizationMode.__members__)}"
        )
    return NormalizationMode[name]


def _processor_steps(directory: Path, name: str) -> dict[str, Json]:
    steps: dict[str, Json] = {}
    for step in read_json(directory / name).get("steps", []):
        kind = step.get("registry_name")
        if kind not in _KNOWN_STEPS:
            raise CheckpointError(
                f"{name} has the step {kind or step.get('class')!r}, which is unknown here: "
                "the exported policy would lack it; remove the step or apply it on the robot"
            )
        if kind in steps:
            raise CheckpointError(f"{name} has two steps '{kind}'; expected one")
        steps[kind] = step
    return steps


def _from_step(directory: Path, step: Json | None, keys: Iterable[str]) -> dict[str, Normalization]:
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
    """Parse a JSON object; CheckpointError where the file is missing or none."""
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


def save_pretrained(
    directory: Path,
    network: VQBeT,
    config: TrainConfig,
    scalings: Scalings,
    facts: Mapping[str, object],
) -> None:
    """Write everything but the training state into an existing directory.

    `facts` are about the data set, among them its `fps`; they stand beside the run's configuration.
    """
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_bytes(directory / WEIGHTS_NAME, safetensors.torch.save(tensors))
    _write_json(directory / CONFIG_NAME, _policy_json(network, config))
    _write_json(directory / TRAIN_CONFIG_NAME, {**config.to_json(), **facts})
    features = {**network.config.input_features, **network.config.output_features}
    stats = save(statistics(scalings))
    before = [
        RENAME,
        BATCH,
        CPU,
        *_relative_step(network.config, _RELATIVE),
        _normalizer(_NORMALIZER, features, config),
    ]
    after = [
        _normalizer(_UNNORMALIZER, network.config.output_features, config),
        *_relative_step(network.config, _ABSOLUTE),
        CPU,
    ]
    _write_processor(directory, PREPROCESSOR, before, stats)
    _write_processor(directory, POSTPROCESSOR, after, stats)


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


def _policy_json(network: VQBeT, config: TrainConfig) -> Json:
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
        "input_features": features_json(network.config.input_features),
        "output_features": features_json(network.config.output_features),
        "device": "cpu",
        **chosen,
    }


def _normalizer(name: str, features: Mapping[str, Feature], config: TrainConfig) -> Json:
    norm_map = {kind: mode.value for kind, mode in config.normalization_mapping.items()}
    return {
        "registry_name": name,
        "config": {
            "eps": EPSILON.value, "features": features_json(features), "norm_map": norm_map,
        },
    }  # fmt: skip


def _relative_step(config: VQBeTConfig, name: str) -> list[Json]:
    """One of LeRobot's pair of steps; none where actions are positions."""
    if not config.use_relative_actions:
        return []
    step: Json = {"enabled": True}
    if name == _RELATIVE:
        step["exclude_joints"] = list(config.relative_exclude_joints)
        step["action_names"] = list(config.action_names) or None
    return [{"registry_name": name, "config": step}]


def _write_processor(directory: Path, name: str, steps: list[Json], stats: bytes) -> None:
    stem = Path(name).stem
    for index, step in enumerate(steps):
        if step["registry_name"] in {_NORMALIZER, _UNNORMALIZER}:
            step["state_file"] = f"{stem}_step_{index}_{step['registry_name']}.safetensors"
            write_bytes(directory / step["state_file"], stats)
    _write_json(directory / name, processor_json(stem, steps))


def _write_json(path: Path, value: object) -> None:
    write_bytes(path, json.dumps(value, indent=4).encode())
