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
        absent = [name for name in STAGES if name not in manifest.graphs(target)]
        _refuse_if(absent, f"lacks the stages {absent} for {target}; export again")
    cpu_stages, policy = manifest.cpu_stages, manifest.policy
    _refuse_if(cpu_stages and "gpt" not in cpu_stages, "lacks the CPU's gpt; export again")
    graphs = *manifest.stages.values(), *cpu_stages.values()
    needed = {"runtime.safetensors", *(stage.file for stage in graphs)} - manifest.files.keys()
    _refuse_if(needed, f"names no digest for {sorted(needed)}; export again")
    unverified = manifest.verification is None
    _refuse_if(unverified, "the bundle was never verified against its checkpoint; export again")
    inputs = manifest.input_features
    vectors = [key for key, f in inputs.items() if f.type != "VISUAL"]
    _refuse_if(
        len(vectors) > 1 or any(inputs[key].type == "ACTION" for key in vectors),
        f"the policy observes {vectors} besides cameras, and this version of vqbet_edge one state "
        "or goal; install a newer one on the robot",
    )
    images = {feature.shape for feature in inputs.values() if feature.type == "VISUAL"}
    _refuse_if(
        not images or any(len(shape) != 3 or shape[0] != 3 for shape in images),
        f"expected cameras of shape (3, H, W), got {sorted(images)}",
    )
    states = [inputs[key].shape for key in vectors]
    actions = {name: feature.shape for name, feature in manifest.output_features.items()}
    widths = [len(shape) for shape in (*states, *actions.values())]
    _refuse_if(
        set(widths) != {1} or list(actions) != ["action"],
        f"expected one state, goal or neither, and one 'action', of shape (dim,), got {states} and "
        f"{actions}",
    )
    relative, kinds, dim = policy.relative_actions, policy.action_kinds, manifest.action_dim
    _refuse_if(
        relative and not len(relative) == dim <= manifest.state_dim,
        f"expected relative_actions for {dim} actions and at least as many states, got "
        f"{len(relative)} and {manifest.state_dim}; export again",
    )
    _refuse_if(
        kinds and len(kinds) != dim,
        f"expected action_kinds for {dim} actions, got {len(kinds)}; export again",
    )
    cameras = len(manifest.image_keys)
    possible = [cameras, cameras + 2] if vectors else [cameras]
    _refuse_if(
        policy.tokens_per_step not in possible,
        f"expected {possible} tokens_per_step (cameras; or with a state and a query), got "
        f"{policy.tokens_per_step}; install a newer vqbet_edge on the robot",
    )
    crop, (height, width, _) = manifest.crop, manifest.frame_shape
    outside = crop.top + crop.height > height or crop.left + crop.width > width
    _refuse_if(outside, f"the crop {crop} leaves the image {height}x{width}")
    _refuse_if(
        len(images) > 1 and crop != CropSpec(0, 0, height, width),
        f"cameras of several sizes {sorted(images)} are not cropped before the encoder, expected "
        f"a crop of {height}x{width} from 0, 0, got {crop}",
    )
    hidden, heads = policy.gpt_hidden_dim, policy.gpt_n_head
    _refuse_if(
        hidden % heads,
        f"gpt_hidden_dim {hidden} is no multiple of gpt_n_head {heads}; export again",
    )


def _refuse_if(wrong: object, what: str) -> None:
    if wrong:
        raise BundleError(f"{MANIFEST_NAME}: {what}")
