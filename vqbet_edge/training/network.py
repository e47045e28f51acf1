"""VQ-BeT in PyTorch: "Behavior Generation with Latent Actions" (Lee et al., 2024), section 3.

From top to bottom: the image encoder, the residual VQ-VAE that turns action chunks into codes, the
GPT, the heads that predict codes and offsets, and the whole network (figure 2 of the paper).

Letters in shapes: B batch, N window (`n_obs_steps`), K cameras, S state width, T tokens, D feature
width, Q action queries (N + `n_action_pred_token` - 1), C codes per layer, W actions per chunk,
A action width.

Every tensor has LeRobot's name, so `load_state_dict(strict=True)` takes LeRobot's
`model.safetensors` and LeRobot takes ours.
"""

import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import CenterCrop

from vqbet_edge.errors import HubError, UsageError
from vqbet_edge.training.config import BACKBONES, NUM_CODE_LAYERS, VQBeTConfig
from vqbet_edge.training.draws import Dropout, Shard, causal_attention
from vqbet_edge.training.resizing import shrink, shrink_cameras


def full_precision(tensor: Tensor) -> torch.autocast:
    """Where mixed precision would cost what a code or a coordinate means."""
    return torch.autocast(tensor.device.type, enabled=False)


# ---- Image encoder: LeRobot's `VQBeTRgbEncoder`.


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of `num_keypoints` learned heat maps (LeRobot's class)."""

    pos_grid: Tensor

    def __init__(self, channels: int, height: int, width: int, num_keypoints: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, num_keypoints, kernel_size=1)
        # float64 as in LeRobot: in float32 linspace's last bits differ.
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, height, dtype=torch.float64),
            torch.linspace(-1, 1, width, dtype=torch.float64),
            indexing="ij",
        )
        grid = torch.stack([x, y], dim=-1).flatten(0, 1)  # (height * width, 2), row by row
        self.register_buffer("pos_grid", grid.float())

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, num_keypoints, 2), x and y in [-1, 1]."""
        heat = self.nets(features).flatten(2)  # (B, num_keypoints, height * width)
        with full_precision(heat):
            expected: Tensor = heat.to(self.pos_grid.dtype).softmax(dim=-1) @ self.pos_grid
        return expected


def build_backbone(config: VQBeTConfig) -> nn.Sequential:
    """A torchvision ResNet up to its last feature map, children numbered as in LeRobot.

    Raises:
        UsageError: torchvision has no such pretrained weights for this backbone.
        HubError: they are not in torch's cache and cannot be downloaded, or are damaged there.
    """
    norm = _group_norm if config.use_group_norm else nn.BatchNorm2d
    if config.vision_backbone == "resnet10_small":
        return small_backbone(norm)
    resnet = torchvision.models.get_model(config.vision_backbone, weights=None, norm_layer=norm)
    if config.pretrained_backbone_weights is not None:
        weights = config.pretrained_backbone_weights
        resnet.load_state_dict(_pretrained_weights(config.vision_backbone, weights))
    return nn.Sequential(*list(resnet.children())[:-2])


def _pretrained_weights(backbone: str, name: str) -> dict[str, Tensor]:
    """The state dict of a whole ResNet, from torch's cache or the network."""
    known = torchvision.models.get_model_weights(backbone)
    owner, _, short = name.rpartition(".")
    if short not in known.__members__ or owner not in {"", known.__name__}:
        names = ", ".join(f"{known.__name__}.{member}" for member in known.__members__)
        raise UsageError(
            f"--pretrained-backbone-weights {name}: torchvision has for {backbone}: {names}"
        )
    url = known[short].value.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        # torchvision's own way to load them would run code from the file.
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        remedy = "it is damaged: delete it" if file.exists() else f"download {url} there"
        raise HubError(
            f"cannot take the weights {name} from {file} ({e}); {remedy}, or train without "
            "--pretrained-backbone-weights"
        ) from e
    return state


def small_backbone(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """ResNet-10 at a quarter of the usual width and less, its last stages at full resolution."""
    # A stride of 4 instead of 2 and a pooling: most of a ResNet's time goes into its stem.
    stem = nn.Conv2d(3, 16, kernel_size=7, stride=4, padding=3, bias=False)
    backbone = nn.Sequential(stem, norm(16), nn.ReLU(inplace=True), nn.Identity())
    for fan_in, fan_out, stride in ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 1)):
        shortcut = None
        if fan_in != fan_out:
            projection = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
            shortcut = nn.Sequential(projection, norm(fan_out))
        block = BasicBlock(fan_in, fan_out, stride, shortcut, norm_layer=norm)
        backbone.append(nn.Sequential(block))
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=channels // 16, num_channels=channels)


class RgbEncoder(nn.Module):
    """One camera frame -> one feature vector of 2 x `spatial_softmax_num_keypoints`."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.resize_shape, self.shape = config.resize_shape, config.encoder_shape
        crop = config.crop_shape
        self.center_crop = nn.Identity() if crop is None else CenterCrop(list(crop))
        self.backbone = build_backbone(config)
        channels, stride = BACKBONES[config.vision_backbone]
        height, width = (-(-side // stride) for side in config.encoder_shape)
        keypoints = config.spatial_softmax_num_keypoints
        self.pool = SpatialSoftmax(channels, height, width, keypoints)
        self.feature_dim = 2 * keypoints
        self.out = nn.Linear(self.feature_dim, self.feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised as the checkpoint asks -> (B, feature_dim), not negative.

        Images that training has cropped at random stay as they are.
        """
        if self.resize_shape is not None and images.shape[-2:] != self.shape:
            images = shrink(images, self.resize_shape)
        keypoints = self.pool(self.backbone(self.center_crop(images)))
        return torch.relu(self.out(keypoints.flatten(1)))  # (B, 2 * num_keypoints)


# ---- Residual VQ-VAE (figure 2, left): LeRobot's `VqVae`, `ResidualVQ`, `EuclideanCodebook`. How
# codebooks learn is in `codebooks.py`.


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Codebook(nn.Module):
    """Code vectors of one layer and the statistics of their moving average."""

    embed: Tensor  # (1, C, D) the code vectors
    embed_avg: Tensor  # (1, C, D) moving sum of the inputs assigned to each code
    cluster_size: Tensor  # (1, C) moving count of the inputs assigned to each code
    initted: Tensor  # (1,) 1 once the code vectors hold their first values

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        embed = torch.empty(1, num_codes, dim)
        nn.init.kaiming_uniform_(embed)
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(1, num_codes))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)

    def nearest(self, x: Tensor) -> Tensor:
        """(M, D) -> int64 (M,): index of the nearest code vector."""
        return torch.cdist(x, self.embed[0]).argmin(dim=-1)


class Quantized(NamedTuple):
    """Result of residual quantisation."""

    latents: Tensor  # (M, D) sum of the chosen code vectors
    codes: Tensor  # int64 (M, 2) primary and secondary code


class ResidualQuantizer(nn.Module):
    """Two codebooks, the second for what the first leaves over."""

    freeze_codebook: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        sizes = config.vqvae_n_embed, config.vqvae_embedding_dim
        self.layers = nn.ModuleList(
            nn.ModuleDict({"_codebook": Codebook(*sizes)}) for _ in range(NUM_CODE_LAYERS)
        )
        self.register_buffer("freeze_codebook", torch.tensor(False))

    @property
    def codebooks(self) -> list[Codebook]:
        """The codebooks, primary first."""
        return [layer["_codebook"] for layer in self.layers]  # type: ignore[index]

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents of shape (M, D)."""
        residual, codes = latents, []
        for codebook in self.codebooks:
            code = codebook.nearest(residual)
            residual = residual - codebook.embed[0, code]
            codes.append(code)
        return Quantized(latents=latents - residual, codes=torch.stack(codes, dim=-1))


class PairDecoder(nn.Module):
    """Code pair -> action chunk: what acting needs of a residual VQ-VAE, of any family.

    Attributes:
        chunk_shape: (W, A).
        decoder: (..., latent) -> (..., W * A).
    """

    chunk_shape: tuple[int, int]
    decoder: nn.Sequential

    @property
    def code_vectors(self) -> list[Tensor]:
        """(C, latent) of every layer, primary first."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """int64 (..., 2) -> (..., W, A), normalised."""
        primary, secondary = self.code_vectors
        latents = primary[codes[..., 0]] + secondary[codes[..., 1]]
        flat: Tensor = self.decoder(latents)  # (..., W * A)
        return flat.view(*codes.shape[:-1], *self.chunk_shape)


class VqVae(PairDecoder):
    """Action chunk <-> code pair."""

    discretized: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.chunk_shape = (config.action_chunk_size, config.action_dim)
        flat, hidden = config.action_chunk_size * config.action_dim, config.vqvae_enc_hidden_dim
        latent = config.vqvae_embedding_dim
        # True once phase 1 is over; an untrained codebook means nothing.
        self.register_buffer("discretized", torch.tensor(False))
        self.vq_layer = ResidualQuantizer(config)
        self.encoder = mlp(flat, hidden, hidden, latent)
        self.decoder = mlp(latent, hidden, hidden, flat)

    @property
    def code_vectors(self) -> list[Tensor]:
        """See `PairDecoder`."""
        return [codebook.embed[0] for codebook in self.vq_layer.codebooks]

    def encode(self, chunks: Tensor) -> Quantized:
        """(M, W, A), normalised -> code pairs and their latents."""
        result: Quantized = self.vq_layer(self.encoder(chunks.flatten(1)))  # (M, W * A) inside
        return result


# ---- GPT (figure 2, middle): LeRobot's `GPT`, which is nanoGPT's.


class GptSizes(Protocol):
    """What a configuration says of its GPT."""

    @property
    def gpt_hidden_dim(self) -> int: ...  # noqa: D102 - LeRobot's names
    @property
    def gpt_input_dim(self) -> int: ...  # noqa: D102
    @property
    def gpt_output_dim(self) -> int: ...  # noqa: D102
    @property
    def gpt_block_size(self) -> int: ...  # noqa: D102
    @property
    def gpt_n_layer(self) -> int: ...  # noqa: D102
    @property
    def gpt_n_head(self) -> int: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102


# Of torch's two, by its own names: exact, or the approximation of GPT-2.
Gelu = Literal["none", "tanh"]


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it."""

    bias: Tensor

    def __init__(self, config: GptSizes) -> None:
        super().__init__()
        width, block = config.gpt_hidden_dim, config.gpt_block_size
        self.num_heads = config.gpt_n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.resid_dropout = Dropout(config.dropout)
        # LeRobot keeps the mask in the checkpoint, so it is a buffer here too.
        self.register_buffer("bias", torch.ones(block, block).tril().view(1, 1, block, block))

    def forward(self, x: Tensor, shard: Shard | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)
            for part in self.c_attn(x).chunk(3, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(q, k, v, dropout, shard)
        joined = y.transpose(1, 2).flatten(2)  # (B, T, D)
        out: Tensor = self.resid_dropout(self.c_proj(joined), shard)
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GptSizes, gelu: Gelu = "none") -> None:
        super().__init__()
        width = config.gpt_hidden_dim
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate=gelu),
            nn.Linear(4 * width, width),
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, shard: Shard | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attn(self.ln_1(x), shard)
        out: Tensor = x + self.dropout(self.mlp(self.ln_2(x)), shard)
        return out


class GPT(nn.Module):
    """Tokens of width `gpt_input_dim` -> features of width `gpt_output_dim`."""

    def __init__(self, config: GptSizes, gelu: Gelu = "none") -> None:
        super().__init__()
        width = config.gpt_hidden_dim
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Linear(config.gpt_input_dim, width),
                "wpe": nn.Embedding(config.gpt_block_size, width),
                "drop": Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, gelu) for _ in range(config.gpt_n_layer)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, config.gpt_output_dim, bias=False)
        self._init_weights(config.gpt_n_layer)

    def forward(self, tokens: Tensor, shard: Shard | None = None) -> Tensor:
        """(B, T, gpt_input_dim) -> (B, T, gpt_output_dim), T at most `gpt_block_size`."""
        parts = self.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = parts["drop"](parts["wte"](tokens) + parts["wpe"](positions), shard)
        for block in parts["h"]:  # type: ignore[attr-defined]
            x = block(x, shard)
        out: Tensor = self.lm_head(parts["ln_f"](x))
        return out

    def _init_weights(self, num_layers: int) -> None:
        # GPT-2 scales the projections into the residual stream by their number; LeRobot does so
        # for the attention's projection only.
        narrow = 0.02 / math.sqrt(2 * num_layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=narrow if name.endswith("c_proj") else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


# ---- Heads (figure 2, right): LeRobot's `VQBeTHead`.


class ActionHead(nn.Module):
    """Features of action queries -> code logits, offsets, action chunks."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width, codes = config.gpt_output_dim, config.vqvae_n_embed
        self.num_codes, self.sequential = codes, config.sequentially_select
        self.offset_shape = (NUM_CODE_LAYERS, codes, config.action_chunk_size, config.action_dim)
        self.vqvae_model = VqVae(config)
        if self.sequential:
            self.map_to_cbet_preds_primary_bin = mlp(width, codes)
            self.map_to_cbet_preds_secondary_bin = mlp(width + codes, codes)
        else:
            self.map_to_cbet_preds_bin = mlp(width, NUM_CODE_LAYERS * codes)
        self.map_to_cbet_preds_offset = mlp(width, math.prod(self.offset_shape))

    def code_logits(self, features: Tensor, primary: Tensor | None = None) -> Tensor:
        """(..., D), int64 (...) -> (..., 2, C): logits of both layers' codes.

        When codes are selected sequentially, the secondary logits are conditioned on the primary
        code; without it its part is left out, which is a row of `secondary_columns`.
        """
        if not self.sequential:
            joint: Tensor = self.map_to_cbet_preds_bin(features)
            return joint.view(*features.shape[:-1], NUM_CODE_LAYERS, self.num_codes)  # (..., 2, C)
        if primary is None:
            given = features.new_zeros(*features.shape[:-1], self.num_codes)
        else:
            given = F.one_hot(primary, self.num_codes).to(features.dtype)
        secondary = self.map_to_cbet_preds_secondary_bin(torch.cat([features, given], dim=-1))
        return torch.stack([self.map_to_cbet_preds_primary_bin(features), secondary], dim=-2)

    @property
    def secondary_columns(self) -> Tensor | None:
        """(C, C), row p is what the primary code p adds to the secondary logits, if it does."""
        if not self.sequential:
            return None
        weight: Tensor = self.map_to_cbet_preds_secondary_bin[0].weight  # type: ignore[assignment]
        return weight.detach()[:, -self.num_codes :].T

    def offsets(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 2, C, W, A): the offset of every code of both layers."""
        flat: Tensor = self.map_to_cbet_preds_offset(features)
        return flat.view(*features.shape[:-1], *self.offset_shape)  # (..., 2, C, W, A)

    def action_chunk(self, features: Tensor, codes: Tensor) -> Tensor:
        """(M, D), int64 (M, 2) -> (M, W, A), normalised: decoded chunk plus the codes' offsets."""
        offsets, rows = self.offsets(features), torch.arange(len(codes), device=codes.device)
        chosen = offsets[rows, 0, codes[:, 0]] + offsets[rows, 1, codes[:, 1]]  # (M, W, A)
        with torch.no_grad(), full_precision(features):
            decoded = self.vqvae_model.decode(codes)
        return decoded + chosen


# ---- The whole network: LeRobot's `VQBeTModel` and `VQBeTPolicy`.


class Trunk(nn.Module):
    """All parts of the policy, named `vqbet.*` in the checkpoint."""

    select_target_actions_indices: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.rgb_encoder = RgbEncoder(config)
        self.action_token = nn.Parameter(torch.randn(1, 1, config.gpt_input_dim))
        self.state_projector = mlp(config.state_dim, config.gpt_input_dim)
        self.rgb_feature_projector = mlp(self.rgb_encoder.feature_dim, config.gpt_input_dim)
        self.policy = GPT(config)
        self.action_head = ActionHead(config)
        first, step = torch.arange(config.num_queries), torch.arange(config.action_chunk_size)
        # (Q, W): row q holds the indices of query q's action chunk within the training sequence;
        # nothing here reads it, LeRobot's checkpoints have it.
        self.register_buffer("select_target_actions_indices", first[:, None] + step)


class VQBeT(nn.Module):
    """The policy network."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.config = config
        self.vqbet = Trunk(config)

    @property
    def head(self) -> ActionHead:
        """Code and offset heads with the RVQ decoder."""
        return self.vqbet.action_head

    def forward(self, images: Tensor, states: Tensor, shard: Shard | None = None) -> Tensor:
        """(B, N, K, 3, H, W) and (B, N, S), normalised -> (B, Q, D): features of action queries.

        Images are whole ones, those of cameras of several sizes as `pack_frames` makes them one
        array, or shrunk to `resize_shape`, and cropped, already. In training, dropout is that of a
        shard of a batch.
        The window's queries come first, then the future's; index N - 1 is the current step, the
        only one used at rollout.
        """
        return self.features(self.encode_images(images), states, shard)

    def features(self, image_tokens: Tensor, states: Tensor, shard: Shard | None = None) -> Tensor:
        """The same for images that are encoded already, (B, N, K, gpt_input_dim)."""
        per_step = self.config.tokens_per_step
        seen = self.config.n_obs_steps * per_step
        out = self.vqbet.policy(self._tokens(image_tokens, states), shard)  # (B, T, D)
        # The query is the last token of its step; behind the window there are queries only.
        return torch.cat([out[:, per_step - 1 : seen : per_step], out[:, seen:]], dim=1)

    def crop(self, frames: Tensor) -> Tensor:
        """(..., H, W) -> what the encoder looks at of them: behind a resize it crops itself."""
        if self.config.resize_shape is not None:
            return frames
        cropped: Tensor = self.vqbet.rgb_encoder.center_crop(frames)
        return cropped

    def embed(self, image_tokens: Tensor) -> Tensor:
        """(..., gpt_input_dim) -> (..., gpt_hidden_dim): frames as the GPT's blocks take them."""
        embedded: Tensor = self.vqbet.policy.transformer["wte"](image_tokens)
        return embedded

    def places(self) -> Tensor:
        """(N, K + 2, gpt_hidden_dim): what every token has from its place: position, query."""
        parts, steps = self.vqbet.policy.transformer, self.config.n_obs_steps
        positions = torch.arange(steps * self.config.tokens_per_step)
        places: Tensor = parts["wpe"](positions).view(steps, -1, self.config.gpt_hidden_dim)
        places[:, -1] += parts["wte"](self.vqbet.action_token)[0]
        return places

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, N, K, 3, H, W) -> (B, N, K, gpt_input_dim): one token per frame."""
        frames = images.flatten(0, 1)  # (B * N, K, 3, H, W)
        size = self.config.resize_shape
        cropped = frames.shape[-2:] == self.config.encoder_shape
        if self.config.cameras_differ and size is not None and not cropped:
            frames = shrink_cameras(frames, self.config.image_sizes, size)
        features = self.vqbet.rgb_encoder(frames.flatten(0, 1))  # (B * N * K, feature_dim)
        tokens: Tensor = self.vqbet.rgb_feature_projector(features)
        return tokens.view(*images.shape[:3], -1)  # (B, N, K, gpt_input_dim)

    def _tokens(self, image_tokens: Tensor, states: Tensor) -> Tensor:
        """Interleave cameras, state and action query step by step, then the future queries."""
        batch, window = states.shape[:2]
        query = self.vqbet.action_token
        steps = torch.cat(
            [
                image_tokens,  # (B, N, K, gpt_input_dim)
                self.vqbet.state_projector(states)[:, :, None],  # (B, N, 1, gpt_input_dim)
                query[:, :, None].expand(batch, window, 1, -1),  # (B, N, 1, gpt_input_dim)
            ],
            dim=2,
        )
        future = query.expand(batch, self.config.n_action_pred_token - 1, -1)
        return torch.cat([steps.flatten(1, 2), future], dim=1)  # (B, T, gpt_input_dim)
