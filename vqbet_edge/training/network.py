"""VQ-BeT in PyTorch ("Behavior Generation with Latent Actions", figure 2).

Letters in shapes: B batch, N window (`n_obs_steps`), K cameras, S state width, Q action queries
(N + `n_action_pred_token` - 1), C codes per layer, W actions per chunk, A action width, D feature
width (`gpt_output_dim`).

Every tensor has LeRobot's name, so `load_state_dict(strict=True)` takes LeRobot's
`model.safetensors` and LeRobot takes ours.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import CenterCrop, RandomCrop

from vqbet_edge.training.config import BACKBONE_CHANNELS, NUM_CODE_LAYERS, VQBeTConfig

# A ResNet halves the image five times, rounding up; the small one three times, so that an image of
# 64x64 still has a map of 8x8 to find keypoints in.
BACKBONE_STRIDE, SMALL_STRIDE = 32, 8


def pixel_grid(height: int, width: int) -> Tensor:
    """Coordinates of a feature map's cells, row by row.

    Returns:
        float32 (height * width, 2): x and y in [-1, 1].
    """
    # float64 as in the reference: in float32 linspace's last bits differ.
    ys = torch.linspace(-1.0, 1.0, height, dtype=torch.float64)
    xs = torch.linspace(-1.0, 1.0, width, dtype=torch.float64)
    if height == 1:
        ys = torch.tensor([-1.0], dtype=torch.float64)
    if width == 1:
        xs = torch.tensor([-1.0], dtype=torch.float64)
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1).float()


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of `num_keypoints` learned heat maps."""

    pos_grid: Tensor

    def __init__(self, channels: int, height: int, width: int, num_keypoints: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, num_keypoints, kernel_size=1)
        self.register_buffer("pos_grid", pixel_grid(height, width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, num_keypoints, 2), x and y in [-1, 1]."""
        heat = self.nets(features).flatten(2)  # (B, K, H * W)
        expected: Tensor = heat.softmax(dim=-1) @ self.pos_grid
        return expected


def shrink(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *shape) without aliasing.

    Averages over whole pixels first and interpolates the rest, because every inference engine has
    these two operators, and none has an antialiased resize.
    """
    factors = [have // want for have, want in zip(images.shape[-2:], shape, strict=True)]
    if max(factors) > 1:
        images = F.avg_pool2d(images, factors)
    return F.interpolate(images, shape, mode="bilinear", align_corners=False)


def build_backbone(config: VQBeTConfig) -> nn.Sequential:
    """A torchvision ResNet up to its last feature map, children numbered as in LeRobot."""
    norm = _group_norm if config.use_group_norm else nn.BatchNorm2d
    if config.vision_backbone == "resnet10_small":
        return _small_backbone(norm)
    resnet = torchvision.models.get_model(
        config.vision_backbone, weights=config.pretrained_backbone_weights, norm_layer=norm
    )
    return nn.Sequential(*list(resnet.children())[:-2])


def _small_backbone(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """ResNet-10 at a quarter of the usual width and less, its last stages at full resolution."""
    width = 16
    layers: list[nn.Module] = [
        # A stride of 4 instead of 2 and a pooling: most of a ResNet's time goes into its stem.
        nn.Conv2d(3, width, kernel_size=7, stride=4, padding=3, bias=False),
        norm(width),
        nn.ReLU(inplace=True),
        nn.Identity(),
    ]
    fan_in = width
    for fan_out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 1)):
        shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), norm(fan_out))
        same = stride == 1 and fan_in == fan_out
        block = BasicBlock(fan_in, fan_out, stride, None if same else shortcut, norm_layer=norm)
        layers.append(nn.Sequential(block))
        fan_in = fan_out
    backbone = nn.Sequential(*layers)
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
        self.resize_shape = config.resize_shape
        size = None if config.crop_shape is None else list(config.crop_shape)
        self.center_crop = nn.Identity() if size is None else CenterCrop(size)
        random = config.crop_is_random and size is not None
        self.random_crop = RandomCrop(cast("list[int]", size)) if random else self.center_crop
        self.backbone = build_backbone(config)
        small = config.vision_backbone == "resnet10_small"
        stride = SMALL_STRIDE if small else BACKBONE_STRIDE
        height, width = (-(-side // stride) for side in config.encoder_shape)
        keypoints = config.spatial_softmax_num_keypoints
        channels = BACKBONE_CHANNELS[config.vision_backbone]
        self.pool = SpatialSoftmax(channels, height, width, keypoints)
        self.feature_dim = 2 * keypoints
        self.out = nn.Linear(self.feature_dim, self.feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images of the configured size.

        Args:
            images: (B, 3, H, W) in [0, 1], normalised as the checkpoint asks.

        Returns:
            (B, feature_dim), not negative.
        """
        if self.resize_shape is not None:
            images = shrink(images, self.resize_shape)
        crop = self.random_crop if self.training else self.center_crop
        keypoints = self.pool(self.backbone(crop(images)))
        return torch.relu(self.out(keypoints.flatten(1)))


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it."""

    bias: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width, block = config.gpt_hidden_dim, config.gpt_block_size
        self.num_heads = config.gpt_n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(config.dropout)
        # LeRobot keeps the mask in the checkpoint, so it is a buffer here too.
        self.register_buffer("bias", torch.ones(block, block).tril().view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)
            for part in self.c_attn(x).chunk(3, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out: Tensor = self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width = config.gpt_hidden_dim
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """Tokens of width `gpt_input_dim` -> features of width `gpt_output_dim`."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width = config.gpt_hidden_dim
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Linear(config.gpt_input_dim, width),
                "wpe": nn.Embedding(config.gpt_block_size, width),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.gpt_n_layer)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, config.gpt_output_dim, bias=False)
        self._init_weights(config.gpt_n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, gpt_input_dim) -> (B, T, gpt_output_dim), T at most `gpt_block_size`."""
        parts = self.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = parts["drop"](parts["wte"](tokens) + parts["wpe"](positions))
        for block in parts["h"]:  # type: ignore[attr-defined]
            x = block(x)
        out: Tensor = self.lm_head(parts["ln_f"](x))
        return out

    def _init_weights(self, num_layers: int) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # GPT-2 scales the projections into the residual stream by their number; upstream does so
        # for the attention's projection only.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Codebook(nn.Module):
    """Code vectors of one layer and the statistics of their moving average.

    Buffers:
        embed: (1, C, D) the code vectors.
        embed_avg: (1, C, D) moving sum of the inputs assigned to each code.
        cluster_size: (1, C) moving count of the inputs assigned to each code.
        initted: (1,) 1 once the code vectors hold their first values.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        embed = torch.empty(1, num_codes, dim)
        nn.init.kaiming_uniform_(embed)
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(1, num_codes))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)

    def nearest(self, x: Tensor) -> Tensor:
        """(N, D) -> int64 (N,): index of the nearest code vector."""
        return torch.cdist(x, self.embed[0]).argmin(dim=-1)


class QuantizerLayer(nn.Module):
    """Holds one code book under the name that LeRobot's checkpoints use."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self._codebook = Codebook(num_codes, dim)

    @property
    def codebook(self) -> Codebook:
        """The layer's code book."""
        return self._codebook


class Quantized(NamedTuple):
    """Result of residual quantisation."""

    latents: Tensor  # (N, D) sum of the chosen code vectors
    codes: Tensor  # int64 (N, 2) primary and secondary code


class ResidualQuantizer(nn.Module):
    """Two code books, the second for what the first leaves over."""

    freeze_codebook: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            QuantizerLayer(config.vqvae_n_embed, config.vqvae_embedding_dim)
            for _ in range(NUM_CODE_LAYERS)
        )
        self.register_buffer("freeze_codebook", torch.tensor(False))

    @property
    def codebooks(self) -> list[Codebook]:
        """The code books, primary first."""
        return [layer.codebook for layer in self.layers]  # type: ignore[misc]

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents of shape (N, D)."""
        residual, codes = latents, []
        for codebook in self.codebooks:
            code = codebook.nearest(residual)
            residual = residual - codebook.embed[0, code]
            codes.append(code)
        return Quantized(latents=latents - residual, codes=torch.stack(codes, dim=-1))

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (..., 2) -> (..., D): sum of both layers' code vectors."""
        primary, secondary = self.codebooks
        return primary.embed[0, codes[..., 0]] + secondary.embed[0, codes[..., 1]]


class VqVae(nn.Module):
    """Action chunk <-> code pair."""

    discretized: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.chunk_shape = (config.action_chunk_size, config.action_dim)
        flat, hidden = config.action_chunk_size * config.action_dim, config.vqvae_enc_hidden_dim
        latent = config.vqvae_embedding_dim
        # True once stage 1 has been trained; an untrained code book means nothing.
        self.register_buffer("discretized", torch.tensor(False))
        self.vq_layer = ResidualQuantizer(config)
        self.encoder = mlp(flat, hidden, hidden, latent)
        self.decoder = mlp(latent, hidden, hidden, flat)

    def encode(self, chunks: Tensor) -> Quantized:
        """(N, chunk, action_dim), normalised -> code pair and its latent."""
        result: Quantized = self.vq_layer(self.encoder(chunks.flatten(1)))
        return result

    def decode(self, codes: Tensor) -> Tensor:
        """int64 (..., 2) -> (..., chunk, action_dim), normalised."""
        out: Tensor = self.decoder(self.vq_layer.lookup(codes))
        return out.view(*codes.shape[:-1], *self.chunk_shape)


class ActionHead(nn.Module):
    """Features of action queries -> code logits, offsets, action chunks (section 3.3)."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width, codes = config.gpt_output_dim, config.vqvae_n_embed
        self.offset_shape = (NUM_CODE_LAYERS, codes, config.action_chunk_size, config.action_dim)
        self.num_codes = codes
        self.vqvae_model = VqVae(config)
        if config.sequentially_select:
            self.map_to_cbet_preds_primary_bin = mlp(width, codes)
            self.map_to_cbet_preds_secondary_bin = mlp(width + codes, codes)
        else:
            self.map_to_cbet_preds_bin = mlp(width, NUM_CODE_LAYERS * codes)
        self.map_to_cbet_preds_offset = mlp(width, torch.Size(self.offset_shape).numel())
        self.sequential = config.sequentially_select

    def code_logits(self, features: Tensor, primary: Tensor) -> Tensor:
        """Logits of both layers' codes.

        Args:
            features: (..., D).
            primary: int64 (...), the primary code that the secondary logits are conditioned on
                when codes are selected sequentially; unused otherwise.

        Returns:
            (..., 2, C).
        """
        if not self.sequential:
            out: Tensor = self.map_to_cbet_preds_bin(features)
            return out.view(*features.shape[:-1], NUM_CODE_LAYERS, self.num_codes)
        one_hot = F.one_hot(primary, self.num_codes).to(features.dtype)
        secondary = self.map_to_cbet_preds_secondary_bin(torch.cat([features, one_hot], dim=-1))
        return torch.stack([self.primary_logits(features), secondary], dim=-2)

    def primary_logits(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., C): logits of the primary code."""
        if self.sequential:
            out: Tensor = self.map_to_cbet_preds_primary_bin(features)
            return out
        joint: Tensor = self.map_to_cbet_preds_bin(features)
        return joint[..., : self.num_codes]

    def offsets(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 2, C, W, A): the offset of every code of both layers."""
        out: Tensor = self.map_to_cbet_preds_offset(features)
        return out.view(*features.shape[:-1], *self.offset_shape)

    def action_chunk(self, features: Tensor, codes: Tensor) -> Tensor:
        """Decoded chunk plus the chosen codes' offsets.

        Args:
            features: (M, D).
            codes: int64 (M, 2).

        Returns:
            (M, W, A), normalised.
        """
        offsets, rows = self.offsets(features), torch.arange(len(codes), device=codes.device)
        chosen = offsets[rows, 0, codes[:, 0]] + offsets[rows, 1, codes[:, 1]]
        with torch.no_grad():
            decoded = self.vqvae_model.decode(codes)
        return decoded + chosen


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
        queries = config.n_obs_steps + config.n_action_pred_token - 1
        first, step = torch.arange(queries)[:, None], torch.arange(config.action_chunk_size)
        # Row q holds the indices of query q's action chunk within the training sequence.
        self.register_buffer("select_target_actions_indices", first + step)


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

    def forward(self, images: Tensor, states: Tensor) -> Tensor:
        """Features of every action query: the window's first, then the future's.

        Args:
            images: (B, N, K, 3, H, W) in [0, 1], normalised as the checkpoint asks.
            states: (B, N, S), normalised.

        Returns:
            (B, Q, D). Index N - 1 is the current step, the only one used at rollout.
        """
        return self.features(self.encode_images(images), states)

    def features(self, image_tokens: Tensor, states: Tensor) -> Tensor:
        """The same for images that are encoded already, (B, N, K, gpt_input_dim)."""
        batch, window = states.shape[:2]
        tokens = self.vqbet.policy(self._tokens(image_tokens, states))  # (B, T, D)
        per_step = self.config.tokens_per_step
        past = tokens[:, per_step - 1 : window * per_step : per_step]
        return torch.cat([past, tokens[:, window * per_step :]], dim=1).view(
            batch, -1, self.config.gpt_output_dim
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, N, K, 3, H, W) -> (B, N, K, gpt_input_dim): one token per frame."""
        features = self.vqbet.rgb_encoder(images.flatten(0, 2))
        out: Tensor = self.vqbet.rgb_feature_projector(features)
        return out.view(*images.shape[:3], -1)

    def _tokens(self, image_tokens: Tensor, states: Tensor) -> Tensor:
        """Interleave cameras, state and action query step by step, then the future queries."""
        batch, window = states.shape[:2]
        query = self.vqbet.action_token
        steps = torch.cat(
            [
                image_tokens,
                self.vqbet.state_projector(states)[:, :, None],
                query[:, :, None].expand(batch, window, 1, -1),
            ],
            dim=2,
        )
        future = query.expand(batch, self.config.n_action_pred_token - 1, -1)
        return torch.cat([steps.flatten(1, 2), future], dim=1)
