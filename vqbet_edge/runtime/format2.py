"""Bundles of format 2, which `vqbet-export` wrote before 2026-12: they act as they did.

The one place that knows the format. A manifest of it becomes one of today's that still says
`format_version` 2: the secondary logits are then one row, to which the runtime adds a column of
`secondary_columns`, and what was demonstrated is inferred from the scaling.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from vqbet_edge.runtime.manifest import (
    ACTION_RANGE,
    STATE_RANGE,
    UNSEALED,
    CalibrationSpec,
    CropSpec,
    FeatureSpec,
    FileName,
    FileSpec,
    Manifest,
    PolicySpec,
    Positive,
    Sha256,
    Shape,
    SourceSpec,
    StageName,
    StageSpec,
    Strict,
    Text,
    VerificationSpec,
    encode_manifest,
)
from vqbet_edge.runtime.normalization import Affine

Arrays = Mapping[str, NDArray[np.float32]]

ACTION_LIMITS = "action.limits"
_LEAST_SPREAD = 0.05


class _Feature(Strict, frozen=True):
    type: Literal["VISUAL", "STATE", "ACTION"]
    shape: Shape


class _Policy(Strict, frozen=True, omit_defaults=True):
    n_obs_steps: Positive
    action_chunk_size: Positive
    vqvae_n_embed: Positive
    gpt_hidden_dim: Positive
    gpt_output_dim: Positive
    gpt_n_layer: Positive
    gpt_n_head: Positive
    bet_softmax_temperature: Annotated[float, Meta(gt=0)]
    sequentially_select: bool
    relative_actions: tuple[bool, ...] = ()


class _Verification(Strict, frozen=True):
    observations: Literal["random", "dataset"]
    samples: Positive
    max_action_error: Annotated[float, Meta(ge=0)]
    code_agreement: Annotated[float, Meta(ge=0, le=1)]
    min_cosine: Annotated[float, Meta(ge=-1, le=1)]


class _Manifest(Strict, frozen=True):
    format_version: Literal[2]
    policy: _Policy
    input_features: dict[Text, _Feature]
    output_features: dict[Text, _Feature]
    crop: CropSpec
    stages: dict[StageName, StageSpec]
    cpu_stages: dict[StageName, StageSpec]
    files: dict[FileName, FileSpec]
    verification: _Verification | None
    calibration: CalibrationSpec | None
    source: SourceSpec
    tools: dict[Text, Text]
    manifest_sha256: Sha256 = UNSEALED


class Decoded(NamedTuple):
    """A manifest as today's, and the one text that format 2 has for it."""

    manifest: Manifest
    text: bytes


def decode(data: bytes) -> Decoded:
    """A manifest of format 2.

    Raises:
        msgspec.DecodeError: it is none.
    """
    old = msgspec.json.decode(data, type=_Manifest)
    cameras = sum(feature.type == "VISUAL" for feature in old.input_features.values())
    policy = PolicySpec(**msgspec.structs.asdict(old.policy), tokens_per_step=cameras + 2)
    verified = old.verification
    parts = msgspec.structs.asdict(old) | {
        "policy": policy,
        "verification": verified
        and VerificationSpec(**msgspec.structs.asdict(verified), cases=verified.observations),
        "input_features": _features(old.input_features),
        "output_features": _features(old.output_features),
    }
    return Decoded(Manifest(**parts, fps=None, license=None), encode_manifest(old))


def _features(features: Mapping[str, _Feature]) -> dict[str, FeatureSpec]:
    return {key: FeatureSpec(feature.type, feature.shape) for key, feature in features.items()}


def with_ranges(arrays: Arrays, manifest: Manifest) -> Arrays:
    """The runtime's arrays, with what was demonstrated as far as the scaling tells.

    Quantiles are scaled as the lowest and highest are, so they cannot be told apart.
    """
    state = Affine.from_arrays(arrays, "state", manifest.state_dim)
    action = Affine.from_arrays(arrays, "action", manifest.action_dim)
    found = dict(arrays)
    if (state.add == -1).all():
        found[STATE_RANGE] = np.stack([state.subtract, state.subtract + 2 / state.multiply])
    if ACTION_LIMITS in arrays:
        found[ACTION_RANGE] = found.pop(ACTION_LIMITS)
    elif (action.subtract == -1).all() and not any(manifest.policy.relative_actions):
        found[ACTION_RANGE] = np.stack([action.add, action.add + 2 * action.multiply])
    return found


def with_judgements(arrays: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Arrays of reference cases, with NaN for what they do not have: it is not compared."""
    steps, codes = len(arrays.get("states", ())), manifest.policy.vqvae_n_embed
    unknown = {
        "scaled_states": (steps, manifest.state_dim),
        "offset_prints": (steps, 2, codes),
        "logit_prints": (steps, manifest.secondary_rows),
    }
    actions = arrays.get("actions", np.zeros((1, 1, manifest.action_dim), np.float32))
    flat = actions.reshape(-1, actions.shape[-1])
    # Of few actions: one that hardly changes is computed no more exactly than its size allows.
    spread = np.maximum(flat.std(axis=0), _LEAST_SPREAD * np.sqrt((flat**2).mean(axis=0)))
    return {
        **arrays,
        **{name: np.full(shape, np.nan, np.float32) for name, shape in unknown.items()},
        "temperature": np.array([manifest.policy.bet_softmax_temperature]),
        "spread": spread,
        "decoded_prints": np.zeros((0, 0), np.float32),
    }
