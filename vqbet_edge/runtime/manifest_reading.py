"""Reading a manifest: strictly, in this format and the one before."""

import msgspec
from msgspec import Struct

from vqbet_edge.errors import BundleError
from vqbet_edge.runtime import format2
from vqbet_edge.runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    STAGES,
    TARGETS,
    CropSpec,
    Manifest,
    PolicySpec,
    encode_manifest,
)


class _Versioned(Struct):
    """The one field that every format has."""

    format_version: int


def decode_manifest(data: bytes) -> Manifest:
    """Decode a manifest strictly.

    Raises:
        BundleError: not canonical JSON of format 3 or 2, or contradicting itself.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{MANIFEST_NAME} has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read; "
            "export the checkpoint again"
        )
    try:
        match msgspec.json.decode(data, type=_Versioned).format_version:
            case 3:
                manifest = msgspec.json.decode(data, type=Manifest)
                spelled = encode_manifest(manifest)
            case 2:
                manifest, spelled = format2.decode(data)
            case version:
                raise BundleError(
                    f"the bundle has format {version}, expected {FORMAT_VERSION} or 2; export its "
                    "checkpoint again: vqbet-export model.safetensors --force"
                )
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{MANIFEST_NAME} is not a manifest of its format: {error}; "
            "export the checkpoint again with this version of vqbet_edge"
        ) from error
    # Comparing the text compares the digest, and rules out what JSON parsers disagree on: repeated
    # keys, byte order marks, other spellings of one number.
    if spelled != data:
        raise BundleError(
            f"{MANIFEST_NAME} was damaged or edited after the export; copy the bundle again or "
            "export again"
        )
    _check_consistency(manifest)
    return manifest


def _check_consistency(manifest: Manifest) -> None:
    for target in manifest.targets or TARGETS:
        missing = [name for name in STAGES if name not in manifest.graphs(target)]
        if missing:
            raise BundleError(
                f"{MANIFEST_NAME} lacks the stages {missing} for {target}; export again"
            )
    if manifest.cpu_stages and "gpt" not in manifest.cpu_stages:
        raise BundleError(f"{MANIFEST_NAME} lacks the CPU's gpt; export again")
    graphs = [*manifest.stages.values(), *manifest.cpu_stages.values()]
    needed = {"runtime.safetensors", *(stage.file for stage in graphs)}
    if not needed <= manifest.files.keys():
        raise BundleError(
            f"{MANIFEST_NAME} names no digest for {sorted(needed - manifest.files.keys())}; "
            "export again"
        )
    if manifest.verification is None:
        raise BundleError("the bundle was never verified against its checkpoint; export again")
    _check_features(manifest)
    _check_policy(manifest.policy)


def _check_features(manifest: Manifest) -> None:
    inputs = list(manifest.input_features.values())
    further = [key for key, f in manifest.input_features.items() if f.type in ("ENV", "ACTION")]
    if further:
        raise BundleError(
            f"{MANIFEST_NAME}: the policy observes {further} besides cameras and a state, which "
            "this version of vqbet_edge does not; install a newer one on the robot"
        )
    images = {feature.shape for feature in inputs if feature.type == "VISUAL"}
    states = [feature.shape for feature in inputs if feature.type == "STATE"]
    actions = [feature.shape for feature in manifest.output_features.values()]
    if not images or any(len(shape) != 3 or shape[0] != 3 for shape in images):
        raise BundleError(
            f"{MANIFEST_NAME}: expected cameras of shape (3, H, W), got {sorted(images)}"
        )
    if [len(shape) for shape in (*states, *actions)] != [1, 1] or "action" not in (
        manifest.output_features
    ):
        raise BundleError(
            f"{MANIFEST_NAME}: expected one state and one 'action' of shape (dim,), "
            f"got {states} and {actions}"
        )
    relative = manifest.policy.relative_actions
    if relative and not len(relative) == manifest.action_dim <= manifest.state_dim:
        raise BundleError(
            f"{MANIFEST_NAME}: expected relative_actions for {manifest.action_dim} actions and at "
            f"least as many states, got {len(relative)} and {manifest.state_dim}; export again"
        )
    kinds, tokens = manifest.policy.action_kinds, len(manifest.image_keys) + 2
    if kinds and len(kinds) != manifest.action_dim:
        raise BundleError(
            f"{MANIFEST_NAME}: expected action_kinds for {manifest.action_dim} actions, got "
            f"{len(kinds)}; export again"
        )
    if manifest.policy.tokens_per_step != tokens:
        raise BundleError(
            f"{MANIFEST_NAME}: expected {tokens} tokens_per_step (cameras, state, query), got "
            f"{manifest.policy.tokens_per_step}; install a newer vqbet_edge on the robot"
        )
    crop, (height, width, _) = manifest.crop, manifest.frame_shape
    if crop.top + crop.height > height or crop.left + crop.width > width:
        raise BundleError(f"{MANIFEST_NAME}: the crop {crop} leaves the image {height}x{width}")
    if len(images) > 1 and crop != CropSpec(0, 0, height, width):
        raise BundleError(
            f"{MANIFEST_NAME}: cameras of several sizes {sorted(images)} are not cropped before "
            f"the encoder, expected a crop of {height}x{width} from 0, 0, got {crop}"
        )


def _check_policy(policy: PolicySpec) -> None:
    if policy.gpt_hidden_dim % policy.gpt_n_head:
        raise BundleError(
            f"{MANIFEST_NAME}: gpt_hidden_dim {policy.gpt_hidden_dim} is no multiple of gpt_n_head "
            f"{policy.gpt_n_head}; export again"
        )
