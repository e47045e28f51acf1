"""Loading a VQ-BeT checkpoint that LeRobot, or this package's trainer, wrote."""

import hashlib
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import msgspec
import safetensors
from safetensors.torch import load_file
from torch import Tensor

from vqbet_edge.errors import CheckpointError
from vqbet_edge.runtime.hub import download, is_hub_id
from vqbet_edge.runtime.manifest import Text
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, VQBeTConfig
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_edge.training.files import check_encodable, remedy, through_last
from vqbet_edge.training.layouts import (
    CONFIG_NAME,
    TRAIN_CONFIG_NAME,
    WEIGHTS_NAME,
    Description,
    Json,
    read_description,
    read_json,
)
from vqbet_edge.training.network import VQBeT

PICKLE_SUFFIXES = {".bin", ".ckpt", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
# Where a checkpoint's directory is below a step's, below all of them, and below a run's.
_INSIDE_A_RUN = ("pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model")
_FILES = [CONFIG_NAME, TRAIN_CONFIG_NAME, WEIGHTS_NAME, "policy_*.json", "policy_*.safetensors"]
_NORMALIZERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


@dataclass(frozen=True)
class Checkpoint(AnyCheckpoint):
    """A policy of LeRobot's or of `vqbet-train`, ready to be exported."""

    network: VQBeT

    @property
    def config(self) -> VQBeTConfig:
        """The network's configuration."""
        return self.network.config


def load_checkpoint(source: str, *, codes_alone: bool = False) -> Checkpoint:
    """Load a checkpoint of any of LeRobot's layouts.

    Args:
        source: a model.safetensors, its directory, or a Hub id: "user/name" or
            "user/name@revision".
        codes_alone: nobody acts with it, so the end of our trainer's phase 1 will do.

    Raises:
        CheckpointError: the checkpoint is missing, unknown, incomplete, sharded, pickled, or its
            codebooks were never trained.
        UsageError: a Hub id without huggingface_hub.
        HubError: it is not here and not to be had from the Hub.
    """
    directory = locate_checkpoint(source)
    config = read_json(directory / CONFIG_NAME)
    tensors = _load_weights(directory / WEIGHTS_NAME)
    path = directory / TRAIN_CONFIG_NAME
    run = read_json(path) if path.is_file() else {}
    # LeRobot's own train_config.json has the policy's fields nested.
    if config.get("resize_shape") is not None and "resize_shape" not in run:
        warnings.warn(
            f"'{directory / CONFIG_NAME}' asks for resize_shape, which LeRobot's VQ-BeT does not "
            "have, and vqbet-train did not write this checkpoint: images are averaged and "
            "interpolated as vqbet-train does it, which differs from an antialiased resize by up "
            "to 0.17 of the range. Verify the export on your data (--verify-data), or train anew",
            stacklevel=2,
        )
    statistics = {k: v.numpy() for k, v in tensors.items() if k.startswith(_NORMALIZERS)}
    weights = {k: v for k, v in tensors.items() if k not in statistics}
    try:
        found = read_description(directory, config, statistics)
        learned = codes_alone and _phase_1_ended(directory, run)
        network = _build(_config(config, found, weights), weights, learned=learned)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"'{directory / CONFIG_NAME}' or its processors lack or misuse {error}; "
            "save the policy again with LeRobot's save_pretrained"
        ) from error
    fps, dataset = run.get("fps"), run.get("dataset")
    if isinstance(dataset, dict):  # LeRobot's
        dataset = dataset.get("root") or dataset.get("repo_id")
    try:
        terms = msgspec.convert(config.get("license"), Text | None)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{CONFIG_NAME}: license: {error}; correct it, or null") from error
    checkpoint = Checkpoint(
        network=network,
        normalization=found.normalization,
        renamed=found.renamed,
        layout=found.layout,
        name=source,
        sha256=hashlib.sha256((directory / WEIGHTS_NAME).read_bytes()).hexdigest(),
        license=terms,
        fps=float(fps) if isinstance(fps, int | float) and 0 < fps < math.inf else None,
        dataset=dataset if isinstance(dataset, str) else None,
    )
    # Statistics that do not do are found here, not when somebody asks for them.
    _ = checkpoint.inputs, checkpoint.action
    return checkpoint


def locate_checkpoint(source: str) -> Path:
    """A checkpoint's directory, downloaded if `source` is a Hub id.

    Raises:
        CheckpointError, UsageError, HubError: as `load_checkpoint` does.
    """
    path = through_last(Path(source))
    check_encodable(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"'{source}' is a pickled file, which can run code when it is loaded; save the policy "
            f"with LeRobot's save_pretrained and pass its {WEIGHTS_NAME}. One of Robot Utility "
            "Models or Contact-Anchored Policies can be exported: vqbet-export takes its tensors"
        )
    if path.is_file():
        if path.name != WEIGHTS_NAME:
            raise CheckpointError(
                f"expected a file named {WEIGHTS_NAME}, got '{source}'; pass the directory that "
                f"holds {WEIGHTS_NAME} and {CONFIG_NAME}"
            )
        return path.parent
    if not path.is_dir() and is_hub_id(source):
        path = download(source, "model", _FILES)
    if not path.is_dir():
        raise CheckpointError(
            f"'{source}' does not exist; pass a {WEIGHTS_NAME}, its directory, or a Hub id "
            "(user/name, user/name@revision)"
        )
    if (path / WEIGHTS_NAME).is_file():
        return path
    names = sorted(entry.name for entry in path.iterdir())
    inside = [through_last(path / place) for place in _INSIDE_A_RUN]
    meant = next((place for place in inside if (place / WEIGHTS_NAME).is_file()), None)
    if meant is not None:
        hint = f"pass '{meant}'"
    elif any(re.search(r"-of-\d+|\.index\.json$|\.distcp$|fsdp", name) for name in names):
        hint = f"it is sharded: gather it into one {WEIGHTS_NAME} with save_pretrained first"
    elif any(Path(name).suffix in PICKLE_SUFFIXES for name in names):
        hint = "pickled weights are never loaded: save the policy with save_pretrained"
    else:
        hint = f"it holds {names[:8]}"
    raise CheckpointError(f"'{path}' holds no {WEIGHTS_NAME}; {hint}")


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is no safetensors file or is truncated ({error}); {remedy(path)}"
        ) from error
    plain = {
        re.sub(r"(^|\.)((_orig_mod|module)\.)+", r"\1", name): tensor
        for name, tensor in tensors.items()
    }
    for name, tensor in plain.items():
        if tensor.is_floating_point() and name.startswith("vqbet.") and not tensor.isfinite().all():
            raise CheckpointError(f"'{path}': '{name}' is not finite; the training diverged")
    return {k: v.float() if v.is_floating_point() else v for k, v in plain.items()}


def _config(config: Json, found: Description, weights: Mapping[str, Tensor]) -> VQBeTConfig:
    """The configuration, with every size that the tensors know taken from them."""
    known = {field.name for field in fields(VQBeTConfig)}
    chosen = {key: value for key, value in config.items() if key in known}
    features = dict(found.features)
    for key in (STATE_KEY, ACTION_KEY):
        if key not in features:
            raise CheckpointError(
                f"{CONFIG_NAME} has no feature '{key}' that VQ-BeT could use; it has "
                f"{', '.join(features) or 'none'}"
            )
    # Before mid-2024 the state projector had the action's width whatever the config says.
    state_dim = _tensor(weights, "vqbet.state_projector.0.weight").shape[1]
    features[STATE_KEY] = replace(features[STATE_KEY], shape=(state_dim,))
    modes = {features[key].type.value: value.mode for key, value in found.normalization.items()}
    shapes = {name: chosen.get(name) for name in ("crop_shape", "resize_shape")}
    chosen |= {
        "output_features": {ACTION_KEY: features.pop(ACTION_KEY)},
        "input_features": features,
        "normalization_mapping": modes,
        **{name: None if shape is None else tuple(shape) for name, shape in shapes.items()},
        "pretrained_backbone_weights": None,
        **found.relative,
        **_sizes(weights),
    }
    return VQBeTConfig(**chosen)


def _tensor(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise CheckpointError(
            f"{WEIGHTS_NAME} lacks '{name}'; it is incomplete or not a VQ-BeT policy"
        )
    return weights[name]


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    gpt, vqvae = "vqbet.policy.", "vqbet.action_head.vqvae_model."
    keypoint_layer = _tensor(weights, "vqbet.rgb_encoder.out.weight")
    primary_head = "vqbet.action_head.map_to_cbet_preds_primary_bin.0.weight"
    hidden, fan_in = _tensor(weights, f"{gpt}transformer.wte.weight").shape
    embed = _tensor(weights, f"{vqvae}vq_layer.layers.0._codebook.embed")
    blocks = [re.match(rf"{re.escape(gpt)}transformer\.h\.(\d+)\.", name) for name in weights]
    return {
        "gpt_hidden_dim": hidden,
        "gpt_input_dim": fan_in,
        "gpt_output_dim": _tensor(weights, f"{gpt}lm_head.weight").shape[0],
        "gpt_block_size": _tensor(weights, f"{gpt}transformer.wpe.weight").shape[0],
        "gpt_n_layer": len({match[1] for match in blocks if match}),
        "vqvae_n_embed": embed.shape[1],
        "vqvae_embedding_dim": embed.shape[2],
        "vqvae_enc_hidden_dim": _tensor(weights, f"{vqvae}encoder.0.weight").shape[0],
        "spatial_softmax_num_keypoints": keypoint_layer.shape[0] // 2,
        "use_group_norm": "vqbet.rgb_encoder.backbone.1.running_mean" not in weights,
        "sequentially_select": primary_head in weights,
    }


def _phase_1_ended(directory: Path, run: Json) -> bool:
    path = directory.parent / "training_state" / "training_step.json"
    return path.is_file() and bool(read_json(path)["step"] >= run["n_vqvae_training_steps"])


def _build(config: VQBeTConfig, weights: Mapping[str, Tensor], *, learned: bool) -> VQBeT:
    if not (learned or _tensor(weights, "vqbet.action_head.vqvae_model.discretized")):
        raise CheckpointError(
            "the checkpoint's codebooks are not trained yet (discretized is false): it was saved "
            "during phase 1; export one that was saved after n_vqvae_training_steps"
        )
    network = VQBeT(config)
    # Derived from the configuration, and wrong in old checkpoints.
    indices = "vqbet.select_target_actions_indices"
    wanted = {**weights, indices: network.state_dict()[indices]}
    try:
        network.load_state_dict(wanted, strict=True)
    except RuntimeError as error:
        flat = " ".join(str(error).split())[:600]
        raise CheckpointError(f"{WEIGHTS_NAME} does not fit {CONFIG_NAME}: {flat}") from error
    return network.eval().requires_grad_(False)
