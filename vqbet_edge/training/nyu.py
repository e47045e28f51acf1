"""Checkpoints of Robot Utility Models and Contact-Anchored Policies: what their `train.py` saves.

The file is a dictionary of `cfg`, the training's configuration, of `model`, the encoder's tensors,
and of `loss_fn`, the policy's; optimisers and schedulers are not looked at. Sizes are the tensors';
only what no shape tells is taken from `cfg`.

The two repositories differ in what they do to a frame, and a file does not say which of them wrote
it. Only the second one knows goals, and its `cfg` has a `goal_dim` even where that is 0.
"""

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqbet_edge.errors import CheckpointError
from vqbet_edge.runtime.manifest import ActionKind
from vqbet_edge.training.config import NUM_CODE_LAYERS
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_edge.training.files import check_encodable
from vqbet_edge.training.layouts import Layout
from vqbet_edge.training.nyu_network import (
    RUN_TEMPERATURE,
    NyuConfig,
    NyuVQBeT,
    ResNetSizes,
)

Tensors = Mapping[str, Tensor]

_PARTS = {"cfg", "model", "loss_fn"}
# Of timm's encoders those whose transform was read: they expect ImageNet's statistics. How far a
# frame is interpolated matters where it is shrunk, and the second repository's is bicubic.
_CROPPED = {"hf-hub:notmahi/dobb-e", "resnet18", "resnet34", "resnet50"}
_SHRUNK = {"resnet50"}
# Displacements in the camera's frame (metres, axis-angle in radians), and where the gripper is.
_KINDS: tuple[ActionKind, ...] = (
    *("displacement",) * 3,
    *("rotation_vector",) * 3,
    "gripper",
)
# What is there twice, or needed for training only.
_UNUSED = re.compile(
    r"_rvq\.|_obs_mask_token$|_vqbet\._vqvae_model\.encoder\."
    r"|_vqbet\._vqvae_model\.vq_layer\.layers\.\d+\._codebook\.(initted|cluster_size|embed_avg)$"
)
# Their names -> ours; their heads have a dropout behind every hidden layer, which has a number.
_RVQ, _GPT = "_vqbet._vqvae_model.", "_vqbet._gpt_model."
_HEADS = {"bin1": "primary", "bin2": "secondary", "offset": "offset"}
_RENAMED = (
    (r"^_obs_adapter\.", "obs_adapter."),
    (r"^_goal_adapter\.linear\.", "goal_adapter."),
    (r"^_vqbet\._gpt_model\.", "gpt."),
    (r"\.mlp\.c_fc\.", ".mlp.0."),
    (r"\.mlp\.c_proj\.", ".mlp.2."),
    (r"^_vqbet\._vqvae_model\.vq_layer\.layers\.(\d+)\._codebook\.embed$",
     r"head.vqvae_model.codebooks.\1"),
    (r"^_vqbet\._vqvae_model\.decoder\.encoder\.", "head.vqvae_model.decoder."),
)  # fmt: skip


@dataclass(frozen=True)
class NyuCheckpoint(AnyCheckpoint):
    """A policy of these two, ready to be exported."""

    network: NyuVQBeT

    @property
    def config(self) -> NyuConfig:
        """The network's configuration."""
        return self.network.config


def load_nyu_checkpoint(source: str) -> NyuCheckpoint:
    """Load a checkpoint of a VQ-BeT of Robot Utility Models or Contact-Anchored Policies.

    Nothing but tensors and plain containers is unpickled.

    Args:
        source: the file.

    Raises:
        CheckpointError: it cannot be read, is no such checkpoint, or of another policy.
    """
    path = Path(source)
    check_encodable(path)
    if not path.is_file():
        raise CheckpointError(f"'{source}' does not exist, or is no file; download it again")
    saved = _read(source)
    settings = _Settings(source, saved["cfg"])
    policy = _tensors(source, "loss_fn", saved["loss_fn"])
    encoder = _tensors(source, "model", saved["model"])
    _check_kind(source, settings, policy)
    try:
        config = _config(settings, encoder, policy)
        network = _network(source, config, encoder, policy)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        flat = " ".join(str(error).split())[:600]
        raise CheckpointError(f"'{source}' is another policy than its sizes say: {flat}") from error
    note = (
        f"codes are drawn at temperature {RUN_TEMPERATURE:g}, as its authors run it; its training "
        f"says {settings.get('temperature')!r}: pass temperature= to EdgePolicy.load for another"
    )
    return NyuCheckpoint(
        network=network,
        normalization={},
        renamed={},
        layout=Layout.CAP if config.bicubic else Layout.RUM,
        name=source,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        action_kinds=_KINDS if config.action_dim == len(_KINDS) else (),
        notes=(note,),
    )


def _read(source: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of a file's format
            saved = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a parser makes of others' bytes
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise CheckpointError(
                f"'{source}' wants to load '{named[1]}', which can run code, and only tensors and "
                "plain containers are loaded; where you trust it, save what is needed alone: "
                "torch.save({k: saved[k] for k in ('cfg', 'model', 'loss_fn')}, NEW)"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"'{source}' cannot be read as a file of torch.save ({type(error).__name__}: {reason});"
            " download it again"
        ) from None
    if not isinstance(saved, dict) or not saved.keys() >= _PARTS:
        found = sorted(map(str, saved))[:8] if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(
            f"'{source}' holds {found}, expected {sorted(_PARTS)}, as Robot Utility Models and "
            "Contact-Anchored Policies save them; other pickled weights are never loaded: save a "
            "LeRobot policy with save_pretrained and pass its directory"
        )
    return saved


@dataclass(frozen=True)
class _Settings:
    """The training's configuration."""

    source: str
    cfg: Any

    def get(self, *path: str) -> Any:  # noqa: ANN401
        """What is there, None where nothing is."""
        value = self.cfg
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def count(self, *path: str) -> int:
        """A positive number."""
        value = self.get(*path)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"'{self.source}': its cfg has {value!r} for {'.'.join(path)}, expected a positive "
                "number, which no tensor's shape tells; save the cfg that the policy was trained "
                "with beside it"
            )
        return value


def _tensors(source: str, part: str, found: object) -> dict[str, Tensor]:
    """What is needed of a part of the file."""
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise CheckpointError(f"'{source}': expected a dictionary of tensors in its '{part}'")
    return {str(name): x for name, x in found.items() if not _UNUSED.match(str(name))}


def _check_kind(source: str, settings: _Settings, policy: Tensors) -> None:
    """Refuse what these repositories train besides, in one sentence each."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in policy)

    asked = {name: settings.get("loss_fn", name) for name in ("tokenized_bet", "xyz_only")}
    others = (
        ("a diffusion policy", has("_diffusion")),
        ("a codebook alone, as train_rvq saves it", not has("_vqbet.")),
        ("a VQ-BeT that observes depth", has("_depth_net.")),
        ("a VQ-BeT that selects its codes jointly", has("_vqbet._map_to_cbet_preds_bin.")),
        ("a VQ-BeT whose goals are tokens of their own", has("_goal_adapter.0.")),
        ("a VQ-BeT whose codes are decoded with the observation", _conditional(policy)),
        *((f"a policy with {name}", value) for name, value in asked.items()),
    )
    for what, it_is in others:
        if it_is:
            raise CheckpointError(
                f"'{source}' is {what}; of Robot Utility Models and Contact-Anchored Policies only "
                "the VQ-BeT policies that they publish can be exported"
            )


def _conditional(policy: Tensors) -> bool:
    """Whether the decoder takes more than the sum of two code vectors."""
    first = policy.get(f"{_RVQ}decoder.encoder.0.weight")
    codes = policy.get(f"{_RVQ}vq_layer.layers.0._codebook.embed")
    return first is not None and codes is not None and first.shape[-1] != codes.shape[-1]


def _config(settings: _Settings, encoder: Tensors, policy: Tensors) -> NyuConfig:
    found = _Shapes(settings.source, policy)
    layers = found.numbers(f"{_RVQ}vq_layer.layers.", "._codebook.embed")
    _, codes, latent = found.shape(f"{_RVQ}vq_layer.layers.0._codebook.embed", 3)
    hidden, fan_in = found.shape(f"{_GPT}transformer.wte.weight")
    obs_width, _ = found.shape("_obs_adapter.weight")
    goal = "_goal_adapter.linear.weight"
    goal_width, goal_dim = found.shape(goal) if goal in policy else (0, 0)
    block, _ = found.shape(f"{_GPT}transformer.wpe.weight")
    window = settings.count("loss_fn", "obs_window_size")
    heads = settings.count("loss_fn", "gpt_model", "config", "n_head")
    chunk = settings.get("loss_fn", "action_sequence_length")
    for wrong, what in (
        (len(layers) != NUM_CODE_LAYERS, f"{len(layers)} layers of codes"),
        (goal_width + obs_width != fan_in, f"tokens of {goal_width} + {obs_width} for {fan_in}"),
        (hidden % heads, f"{heads} heads of {hidden} together"),
        (window > block, f"a window of {window} and positions for {block}"),
        # Of several, their code executes the last.
        (chunk is not None and chunk != 1, f"chunks of {chunk!r} actions"),
    ):
        if wrong:
            raise CheckpointError(f"'{settings.source}' has {what}, which cannot be exported")
    decoder = found.mlp(f"{_RVQ}decoder.encoder.", last=f"{_RVQ}decoder.fc.weight")
    return NyuConfig(
        resnet=_resnet(_Shapes(settings.source, encoder)),
        bicubic=_is_shrunk(settings),
        goal_dim=goal_dim,
        obs_width=obs_width,
        goal_width=goal_width,
        action_dim=found.shape(f"{_RVQ}decoder.fc.weight")[0],
        n_obs_steps=window,
        vqvae_n_embed=codes,
        latent=latent,
        decoder_widths=decoder,
        primary_widths=found.mlp("_vqbet._map_to_cbet_preds_bin1."),
        secondary_widths=found.mlp("_vqbet._map_to_cbet_preds_bin2."),
        offset_widths=found.mlp("_vqbet._map_to_cbet_preds_offset."),
        gpt_hidden_dim=hidden,
        gpt_output_dim=found.shape(f"{_GPT}lm_head.weight")[0],
        gpt_n_layer=len(found.numbers(f"{_GPT}transformer.h.", ".ln_1.weight")),
        gpt_n_head=heads,
        gpt_block_size=block,
    )


@dataclass(frozen=True)
class _Shapes:
    """What tensors say about a network."""

    source: str
    tensors: Tensors

    def shape(self, name: str, dims: int = 2) -> tuple[int, ...]:
        """Of a tensor that must be there, with as many dimensions and no empty one."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.ndim != dims or not tensor.numel():
            has = "nothing" if tensor is None else tuple(tensor.shape)
            raise CheckpointError(
                f"'{self.source}' has {has} for '{name}', expected {dims} dimensions; it is "
                "incomplete, or another policy"
            )
        return tuple(tensor.shape)

    def numbers(self, prefix: str, suffix: str) -> list[int]:
        """What stands between both in names, in order."""
        between = re.compile(re.escape(prefix) + r"(\d+)" + re.escape(suffix))
        return sorted(int(found[1]) for found in map(between.fullmatch, self.tensors) if found)

    def mlp(self, prefix: str, last: str | None = None) -> tuple[int, ...]:
        """Widths of the hidden layers; `last` is a layer behind them of another name."""
        names = [f"{prefix}{number}.weight" for number in self.numbers(prefix, ".weight")]
        shapes = [self.shape(name) for name in (*names, *filter(None, [last]))]
        return tuple(width for width, _ in shapes[:-1])


def _resnet(found: _Shapes) -> ResNetSizes:
    stages = range(1, 1 + len(found.numbers("model.layer", ".0.conv1.weight")))
    return ResNetSizes(
        stem=found.shape("model.conv1.weight", 4)[0],
        blocks=tuple(len(found.numbers(f"model.layer{i}.", ".conv1.weight")) for i in stages),
        widths=tuple(found.shape(f"model.layer{i}.0.conv1.weight", 4)[0] for i in stages),
        bottleneck="model.layer1.0.conv3.weight" in found.tensors,
    )


def _is_shrunk(settings: _Settings) -> bool:
    """Whether the repository that wrote this shrinks frames; the other cuts their centre out."""
    parts = settings.cfg, settings.get("loss_fn")
    shrinks = any(isinstance(part, dict) and "goal_dim" in part for part in parts)
    name, known = settings.get("model", "model_name"), _SHRUNK if shrinks else _CROPPED
    if name not in sorted(known):
        raise CheckpointError(
            f"'{settings.source}': its cfg names the encoder {name!r}, expected one of "
            f"{sorted(known)}: what another does to a frame before it sees it is not known here"
        )
    return shrinks


def _network(source: str, config: NyuConfig, encoder: Tensors, policy: Tensors) -> NyuVQBeT:
    for name, x in (*encoder.items(), *policy.items()):
        if x.is_floating_point() and not x.isfinite().all():
            raise CheckpointError(f"'{source}': '{name}' is not finite; the training diverged")
        if name.endswith(".attn.bias") and not torch.equal(x, torch.ones_like(x).tril()):
            raise CheckpointError(f"'{source}': '{name}' is no causal mask: it is another policy")
    weights = {re.sub(r"^model\.", "encoder.", name): x for name, x in encoder.items()}
    weights |= {_renamed(name, config): x for name, x in policy.items()}
    for name in [name for name in weights if name.startswith("head.vqvae_model.codebooks.")]:
        weights[name] = weights[name][0]
    network = NyuVQBeT(config)
    network.load_state_dict(weights, strict=True)
    return network.eval().requires_grad_(False)


def _renamed(name: str, config: NyuConfig) -> str:
    """Our name of one of the policy's tensors."""
    for theirs, ours in _RENAMED:
        name = re.sub(theirs, ours, name)
    last = f"head.vqvae_model.decoder.{2 * len(config.decoder_widths)}."
    name = name.replace(f"{_RVQ}decoder.fc.", last)
    head = re.match(r"_vqbet\._map_to_cbet_preds_(bin1|bin2|offset)\.(\d+)\.(.*)", name)
    if head is None:
        return name
    # A layer, its ReLU and its dropout; ours have no dropout.
    return f"head.{_HEADS[head[1]]}.{int(head[2]) // 3 * 2}.{head[3]}"
