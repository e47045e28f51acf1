"""Loading a VQ-BeT checkpoint that LeRobot, or this package's trainer, wrote."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from vqbet_edge.errors import CheckpointError, UsageError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, NormalizationMode, VQBeTConfig
from vqbet_edge.training.layouts import Era, Json, Layout, read_json, read_layout
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import (
    Scaling,
    identity,
    normalizing,
    required_statistics,
    unnormalizing,
)

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
_PICKLE_SUFFIXES = {".bin", ".ckpt", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NORMALIZERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


@dataclass(frozen=True)
class Checkpoint:
    """A policy ready to be exported.

    Attributes:
        network: float32, in eval mode, on the CPU.
        inputs: by the policy's key: robot units -> network units, images from [0, 1].
        action: network units -> robot units.
        renamed: the policy's key -> the key that the robot passes, where they differ.
        name: where it was loaded from, as the user wrote it.
        sha256: digest of model.safetensors.
        license: as the configuration names it.
    """

    network: VQBeT
    inputs: Mapping[str, Scaling]
    action: Scaling
    renamed: Mapping[str, str]
    era: Era
    name: str
    sha256: str
    license: str | None = None

    @property
    def config(self) -> VQBeTConfig:
        """The network's configuration."""
        return self.network.config


def load_checkpoint(source: str) -> Checkpoint:
    """Load a checkpoint of any era.

    Args:
        source: a model.safetensors, its directory, or a Hub repository id.

    Raises:
        CheckpointError: the checkpoint is missing, unknown, incomplete, sharded, pickled, or its
            code books were never trained.
        UsageError: a Hub id without huggingface_hub.
    """
    directory = _locate(source)
    config = read_json(directory / CONFIG_NAME)
    tensors = _load_weights(directory / WEIGHTS_NAME)
    statistics = {k: v.numpy() for k, v in tensors.items() if k.startswith(_NORMALIZERS)}
    weights = {k: v for k, v in tensors.items() if k not in statistics}
    try:
        layout = read_layout(directory, config, statistics)
        network = _build(_config(config, layout, weights), weights)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"'{directory / CONFIG_NAME}' or its processors lack or misuse {error}; "
            "save the policy again with LeRobot's save_pretrained"
        ) from error
    return Checkpoint(
        network=network,
        inputs={key: _scaling(layout, key, network.config) for key in layout.input_features},
        action=_scaling(layout, ACTION_KEY, network.config),
        renamed=layout.renamed,
        era=layout.era,
        name=source,
        sha256=hashlib.sha256((directory / WEIGHTS_NAME).read_bytes()).hexdigest(),
        license=_license(config),
    )


def _license(config: Json) -> str | None:
    name = config.get("license")
    return name if isinstance(name, str) else None


def _locate(source: str) -> Path:
    """The checkpoint's directory, downloaded if `source` is a Hub id."""
    path = Path(source)
    if path.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"'{source}' is a pickled file, which can run code when it is loaded; save the policy "
            f"with LeRobot's save_pretrained and pass its {WEIGHTS_NAME}"
        )
    if path.is_dir():
        return _check_directory(path)
    if path.is_file():
        if path.name != WEIGHTS_NAME:
            raise CheckpointError(
                f"expected a file named {WEIGHTS_NAME}, got '{source}'; pass the directory that "
                f"holds {WEIGHTS_NAME} and {CONFIG_NAME}"
            )
        return _check_directory(path.parent)
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return _check_directory(_download(source))
    raise CheckpointError(
        f"'{source}' does not exist; pass a {WEIGHTS_NAME}, its directory, or a Hub id (user/name)"
    )


def _check_directory(directory: Path) -> Path:
    if (directory / WEIGHTS_NAME).is_file():
        return directory
    names = sorted(entry.name for entry in directory.iterdir())
    if (directory / "pretrained_model" / WEIGHTS_NAME).is_file():
        hint = f"pass '{directory / 'pretrained_model'}'"
    elif any(re.search(r"-of-\d+|\.index\.json$|\.distcp$|fsdp", name) for name in names):
        hint = f"it is sharded: gather it into one {WEIGHTS_NAME} with save_pretrained first"
    elif any(Path(name).suffix in _PICKLE_SUFFIXES for name in names):
        hint = "pickled weights are never loaded: save the policy with save_pretrained"
    else:
        hint = f"it holds {names[:8]}"
    raise CheckpointError(f"'{directory}' holds no {WEIGHTS_NAME}; {hint}")


def _download(repo_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"'{repo_id}' does not exist here; to read it from the Hub: pip install huggingface_hub"
        ) from error
    patterns = [CONFIG_NAME, WEIGHTS_NAME, "policy_*.json", "policy_*.safetensors"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(f"cannot read '{repo_id}' from the Hub: {error}") from error


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is no safetensors file or is truncated ({error}); copy or save it again"
        ) from error
    plain = {
        re.sub(r"(^|\.)((_orig_mod|module)\.)+", r"\1", name): tensor
        for name, tensor in tensors.items()
    }
    for name, tensor in plain.items():
        if tensor.is_floating_point() and name.startswith("vqbet.") and not tensor.isfinite().all():
            raise CheckpointError(f"'{path}': '{name}' is not finite; the training diverged")
    return {k: v.float() if v.is_floating_point() else v for k, v in plain.items()}


def _config(config: Json, layout: Layout, weights: Mapping[str, Tensor]) -> VQBeTConfig:
    """The configuration, with every size that the tensors know taken from them."""
    known = {field.name for field in fields(VQBeTConfig)}
    chosen = {key: value for key, value in config.items() if key in known}
    crop = chosen.get("crop_shape")
    modes = {
        {**layout.input_features, **layout.output_features}[key].type.value: value.mode
        for key, value in layout.normalization.items()
        if key in {**layout.input_features, **layout.output_features}
    }
    # Before mid-2024 the state projector had the action's width whatever the config says.
    state_dim = _tensor(weights, "vqbet.state_projector.0.weight").shape[1]
    state = replace(layout.input_features[STATE_KEY], shape=(state_dim,))
    chosen |= {
        "input_features": {**layout.input_features, STATE_KEY: state},
        "output_features": layout.output_features,
        "normalization_mapping": modes,
        "crop_shape": None if crop is None else tuple(crop),
        "pretrained_backbone_weights": None,
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


def _build(config: VQBeTConfig, weights: Mapping[str, Tensor]) -> VQBeT:
    if not _tensor(weights, "vqbet.action_head.vqvae_model.discretized"):
        raise CheckpointError(
            "the checkpoint's code books are not trained yet (discretized is false): it was saved "
            "during stage 1; export one that was saved after n_vqvae_training_steps"
        )
    network = VQBeT(config)
    # Derived from the configuration, and wrong in old checkpoints.
    indices = "vqbet.select_target_actions_indices"
    wanted = {**weights, indices: network.state_dict()[indices]}
    try:
        network.load_state_dict(wanted, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{WEIGHTS_NAME} does not fit {CONFIG_NAME}: {_shorten(str(error))}"
        ) from error
    return network.eval().requires_grad_(False)


def _shorten(text: str, limit: int = 600) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]} ..."


def _scaling(layout: Layout, key: str, config: VQBeTConfig) -> Scaling:
    features = {**config.input_features, **config.output_features}
    # (dim,) for vectors; for images (3, height, width) it is the channels that are scaled.
    dim = features[key].shape[0]
    found = layout.normalization.get(key)
    if found is None or found.mode is NormalizationMode.IDENTITY:
        return identity(dim)
    stats = required_statistics(key, found.mode, found.stats, dim)
    convert = unnormalizing if key == ACTION_KEY else normalizing
    return convert(found.mode, stats, found.epsilon)
