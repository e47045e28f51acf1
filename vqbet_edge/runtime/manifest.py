"""`manifest.json`: what a bundle holds. Every field is explained in docs/bundle.md."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

FORMAT_VERSION: Literal[3] = 3
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
# Arrays of runtime.safetensors: lowest and highest demonstrated value, in the robot's units.
ACTION_RANGE, STATE_RANGE = "action.range", "state.range"

Positive = Annotated[int, Meta(ge=1, le=1 << 31)]
# One path component of plain characters: a manifest cannot name anything outside its bundle.
FileName = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,64}\.[a-z0-9]{1,16}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
# No control characters: texts are shown on terminals, which obey them.
Text = Annotated[str, Meta(max_length=4096, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Shape = Annotated[tuple[Positive, ...], Meta(max_length=8)]
StageName = Literal["vision_encoder", "gpt", "code_heads", "rvq_decoder"]
UNSEALED = "0" * 64
Precision = Literal["fp32", "fp16", "int8"]
# Whose kernels a graph is for: they want different ones.
Target = Literal["tensorrt", "cpu"]
# What a number of an action means, which decides how it may be held, interpolated or averaged.
ActionKind = Literal[
    "unknown", "position", "displacement", "velocity", "angle", "rotation_vector", "gripper"
]
# Who lays a checkpoint out so: releases of LeRobot, or the code of a paper.
Layout = Literal["0.1", "0.2-0.3", "0.4+", "Robot Utility Models", "Contact-Anchored Policies"]
# Types of features that are vectors and observed.
VECTORS = "STATE", "ENV"
STAGES: tuple[StageName, ...] = ("vision_encoder", "gpt", "code_heads", "rvq_decoder")
TARGETS: tuple[Target, ...] = ("tensorrt", "cpu")


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every part of the manifest: immutable, no unknown fields."""


class FileSpec(Strict, frozen=True):
    """Digest and size in bytes of one file of the bundle."""

    sha256: Sha256
    size: Annotated[int, Meta(ge=0, le=1 << 32)]


class StageSpec(Strict, frozen=True):
    """One graph: its file and the precision of its arithmetic.

    Its inputs and outputs follow from the policy's sizes: see `vqbet_edge.runtime.signatures`.
    """

    file: FileName
    precision: Precision


class FeatureSpec(Strict, frozen=True):
    """One observation or action feature as in the checkpoint; images are (3, H, W).

    The types are LeRobot's: `ENV` is a further input such as a goal.
    """

    type: Literal["VISUAL", "STATE", "ENV", "ACTION"]
    shape: Shape


class CropSpec(Strict, frozen=True):
    """The rectangle of pixels that the runtime cuts out of every frame."""

    top: Annotated[int, Meta(ge=0, le=1 << 31)]
    left: Annotated[int, Meta(ge=0, le=1 << 31)]
    height: Positive
    width: Positive

    @property
    def rows(self) -> slice:
        """Of a frame (..., H, W, C)."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Likewise."""
        return slice(self.left, self.left + self.width)

    def cut(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The rectangle of frames (..., H, W, C), as a view."""
        return frames[..., self.rows, self.columns, :]


class PolicySpec(Strict, frozen=True, omit_defaults=True):
    """What the runtime needs of the policy's configuration, under LeRobot's field names.

    `tokens_per_step` are what an observation is to the transformer: of LeRobot's policies one per
    camera, the state and the action query; where it is one per camera, a state or goal is part of
    those. With `sequentially_select` the secondary code is drawn knowing the primary one.
    `relative_actions` says for every action whether it is a distance from the state, and is empty
    where none is: see `ActionScaling`. `action_kinds` says what each number of an action is, and is
    empty where nobody said.
    """

    n_obs_steps: Positive
    action_chunk_size: Positive
    vqvae_n_embed: Positive
    gpt_hidden_dim: Positive
    gpt_output_dim: Positive
    gpt_n_layer: Positive
    gpt_n_head: Positive
    tokens_per_step: Positive
    bet_softmax_temperature: Annotated[float, Meta(gt=0)]
    sequentially_select: bool
    relative_actions: tuple[bool, ...] = ()
    action_kinds: tuple[ActionKind, ...] = ()


class VerificationSpec(Strict, frozen=True):
    """Summary of report.json: on what the export was verified and how it did.

    `cases` is what the reference cases show: noise, or what the demonstrations' cameras saw.
    """

    observations: Literal["random", "dataset"]
    cases: Literal["random", "dataset"]
    samples: Positive
    max_action_error: Annotated[float, Meta(ge=0)]
    code_agreement: Annotated[float, Meta(ge=0, le=1)]
    min_cosine: Annotated[float, Meta(ge=-1, le=1)]


class SourceSpec(Strict, frozen=True):
    """The checkpoint that was exported."""

    name: Text
    sha256: Sha256
    layout: Layout

    @property
    def writer(self) -> str:
        """Whose code lays a checkpoint out so."""
        return f"LeRobot {self.layout}" if self.layout[0].isdigit() else self.layout


class CalibrationSpec(Strict, frozen=True):
    """What INT8 was calibrated on: `sha256` is over all sampled observations and their places."""

    source: Text
    sha256: Sha256
    observations: Positive


class Manifest(Strict, frozen=True):
    """The whole manifest.

    `stages` has the four graphs for TensorRT, `cpu_stages` those that CPUs take in their place;
    either is empty in a bundle for the other target alone, where `cpu_stages` has all four.
    `fps` is how many observations a second the demonstrations have; None is unknown. `license` is
    the checkpoint's. `files` names every file but the manifest. `manifest_sha256` is the digest of
    the manifest's text with zeros in its place; `encode_manifest` fills it in.
    """

    format_version: Literal[2, 3]
    policy: PolicySpec
    input_features: dict[Text, FeatureSpec]
    output_features: dict[Text, FeatureSpec]
    crop: CropSpec
    stages: dict[StageName, StageSpec]
    cpu_stages: dict[StageName, StageSpec]
    fps: Annotated[float, Meta(gt=0, le=1e6)] | None
    license: Text | None
    files: dict[FileName, FileSpec]
    verification: VerificationSpec | None
    calibration: CalibrationSpec | None
    source: SourceSpec
    tools: dict[Text, Text]
    manifest_sha256: Sha256 = UNSEALED

    def graphs(self, target: Target) -> Mapping[StageName, StageSpec]:
        """The four graphs of a target; none if the bundle is not for it."""
        if target == "tensorrt":
            return self.stages
        return {**self.stages, **self.cpu_stages} if self.cpu_stages else {}

    @property
    def targets(self) -> tuple[Target, ...]:
        """Whom the bundle has graphs for."""
        return tuple(target for target in TARGETS if self.graphs(target))

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Of all graphs, the most precise first."""
        found = {spec.precision for spec in (*self.stages.values(), *self.cpu_stages.values())}
        return tuple(precision for precision in get_args(Precision) if precision in found)

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Keys of the cameras, in token order."""
        return tuple(k for k, f in self.input_features.items() if f.type == "VISUAL")

    @property
    def image_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(height, width, 3) of every camera's frame, in token order."""
        found = ((key, self.input_features[key].shape) for key in self.image_keys)
        return {key: (height, width, channels) for key, (channels, height, width) in found}

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of the area that holds any camera's frame; see `vqbet_edge.runtime.cameras`."""
        heights, widths, _ = zip(*self.image_shapes.values(), strict=True)
        return max(heights), max(widths), 3

    @property
    def state_key(self) -> str:
        """Key of the one vector that the policy observes: the robot's state, or a goal.

        Of a policy that observes cameras alone, the name that a state would have.
        """
        keys = (key for key, f in self.input_features.items() if f.type in VECTORS)
        return next(keys, "observation.state")

    @property
    def state_dim(self) -> int:
        """Width of that vector; 0 where the policy observes cameras alone."""
        feature = self.input_features.get(self.state_key)
        return 0 if feature is None else feature.shape[0]

    @property
    def observation_shapes(self) -> dict[str, Shape]:
        """Of everything that the policy observes: the cameras' frames, the state or goal if any."""
        vector = {self.state_key: (self.state_dim,)} if self.state_dim else {}
        return {**self.image_shapes, **vector}

    @property
    def secondary_rows(self) -> int:
        """Rows of secondary logits: one, or one for every primary code that may have been drawn."""
        sequential = self.policy.sequentially_select and self.format_version >= FORMAT_VERSION
        return self.policy.vqvae_n_embed if sequential else 1

    @property
    def precision(self) -> Precision:
        """The least precise of all graphs'."""
        return self.precisions[-1]

    @property
    def action_dim(self) -> int:
        """Width of one action."""
        return self.output_features["action"].shape[0]


def encode_manifest(manifest: Manifest) -> bytes:
    """The one canonical text of a manifest: indented JSON, fields in their order, sealed."""

    def spelled(digest: str) -> bytes:
        text = msgspec.json.encode(msgspec.structs.replace(manifest, manifest_sha256=digest))
        return msgspec.json.format(text, indent=2) + b"\n"

    return seal(spelled)


def seal(spelled: Callable[[str], bytes]) -> bytes:
    """A manifest's text with its own digest: of the text with zeros in the digest's place."""
    return spelled(hashlib.sha256(spelled(UNSEALED)).hexdigest())
