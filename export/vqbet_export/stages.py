"""The policy cut into four inference modules.

Letters in shapes: B batch, N window, K cameras, H and W height and width of a frame as the runtime
crops it, S state width, D `gpt_hidden_dim`, T tokens (N * (K + 2)), C codes per layer, W actions
per chunk, A action width.

Differences from the training network, all exact but for rounding:
- scaling of uint8, image normalisation and resize are part of the encoder, the crop too where a
  resize comes before it; BatchNorm is folded into the convolutions;
- `rgb_feature_projector`, `state_projector` and the action query are multiplied through the token
  embedding `wte`, so frame tokens leave the encoder with the transformer's width;
- future action queries are dropped (attention is causal and rollout reads the current query
  only), and the last block computes one row;
- the attention's 1/sqrt(head width) is folded into the query projection.

With `dtype` float16, convolutions and matrix products run in float16; LayerNorm, every softmax and
the borders of the graphs stay float32.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.model.checkpoint import Checkpoint
from vqbet_edge.model.config import NUM_CODE_LAYERS, VQBeTConfig
from vqbet_edge.model.gpt import Block
from vqbet_edge.model.vision import shrink
from vqbet_export.folding import AffineMap, fold_batch_norms

# Finite, so that no row of the softmax can become NaN; below any score; within float16.
MASKED_SCORE = -1e4


def token_embedding(checkpoint: Checkpoint) -> AffineMap:
    """The transformer's token embedding `wte`."""
    return AffineMap.of(checkpoint.network.vqbet.policy.transformer["wte"])


class Crop(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def apply(self, images: Tensor) -> Tensor:
        """(..., H, W) -> (..., height, width)."""
        rows = slice(self.top, self.top + self.height)
        return images[..., rows, self.left : self.left + self.width]


def center_crop(size: tuple[int, ...], crop: tuple[int, int]) -> Crop:
    """The centre of an image of `size`, rounded as torchvision's `CenterCrop` rounds."""
    top, left = (round((full - part) / 2.0) for full, part in zip(size, crop, strict=True))
    return Crop(top, left, *crop)


def runtime_crop(config: VQBeTConfig) -> Crop:
    """What the runtime cuts out of every frame before the encoder sees it.

    The crop costs nothing while the frame is copied; only behind a resize the graph has to do it.
    """
    full = config.image_shape[1:]
    return center_crop(full, config.encoder_shape if config.resize_shape is None else full)


class VisionEncoderStage(nn.Module):
    """Camera frames -> tokens of the transformer's width."""

    scale: Tensor
    shift: Tensor
    pos_grid: Tensor

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        trunk, config = checkpoint.network.vqbet, checkpoint.config
        self.dtype, self.resize_shape = dtype, config.resize_shape
        self.crop = center_crop(config.resize_shape or config.encoder_shape, config.encoder_shape)
        scalings = [checkpoint.inputs[key] for key in config.image_keys]
        multiply = torch.tensor([s.multiply.tolist() for s in scalings])  # (K, 3)
        subtract = torch.tensor([s.subtract.tolist() for s in scalings])
        add = torch.tensor([s.add.tolist() for s in scalings])
        # One camera's constants per row, broadcast over (B, K, 3, H, W).
        self.register_buffer("scale", (multiply / 255)[:, :, None, None])
        self.register_buffer("shift", (add - subtract * multiply)[:, :, None, None])
        self.shifted = bool(self.shift.any())
        self.backbone = fold_batch_norms(trunk.rgb_encoder.backbone).to(dtype)
        self.heat_maps = copy.deepcopy(trunk.rgb_encoder.pool.nets).to(dtype)
        self.register_buffer("pos_grid", trunk.rgb_encoder.pool.pos_grid.clone())
        self.out = copy.deepcopy(trunk.rgb_encoder.out).to(dtype)
        projector = AffineMap.of(trunk.rgb_feature_projector[0])
        self.project = token_embedding(checkpoint).after(projector).layer(dtype)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 (B, K, H, W, 3), cropped -> float32 (B, K, D)."""
        # TensorRT takes uint8 at a graph's border only, so the cast comes first.
        images = frames.float().permute(0, 1, 4, 2, 3) * self.scale
        if self.shifted:
            images = images + self.shift
        images = images.flatten(0, 1)
        if self.resize_shape is not None:
            images = self.crop.apply(shrink(images, self.resize_shape))
        batch, cameras = frames.shape[:2]
        heat = self.heat_maps(self.backbone(images.to(self.dtype)))
        keypoints = heat.float().flatten(2).softmax(dim=-1) @ self.pos_grid  # (B * K, points, 2)
        features = F.relu(self.out(keypoints.flatten(1).to(self.dtype)))
        return self.project(features).float().reshape(batch, cameras, -1)  # type: ignore[no-any-return]


class _Norm(nn.Module):
    """LayerNorm in float32 between layers of another type."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm).float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) of the same type."""
        return self.norm(x.float()).to(x.dtype)  # type: ignore[no-any-return]


class _Block(nn.Module):
    """A transformer block; with `last_row` it computes only the newest token's output.

    Tokens are rows of one matrix, (B * T, D), so that every linear layer is a plain product.
    """

    mask: Tensor | None

    def __init__(self, block: Block, tokens: int, dtype: torch.dtype, *, last_row: bool) -> None:
        super().__init__()
        self.tokens, self.last_row, self.heads = tokens, last_row, block.attn.num_heads
        self.norm_1, self.norm_2 = _Norm(block.ln_1), _Norm(block.ln_2)
        weight, bias = AffineMap.of(block.attn.c_attn)
        width = weight.shape[1]
        scale = 1 / math.sqrt(width // self.heads)
        self.query = AffineMap(weight[:width] * scale, bias[:width] * scale).layer(dtype)
        self.key_value = AffineMap(weight[width:], bias[width:]).layer(dtype)
        self.out = AffineMap.of(block.attn.c_proj).layer(dtype)
        self.mlp = copy.deepcopy(block.mlp[:3]).to(dtype)
        mask = None if last_row else torch.full((tokens, tokens), MASKED_SCORE).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """(B * T, D) -> (B * T, D), or (B, D) with `last_row`."""
        normed = self.norm_1(x)
        queries = self._newest(normed) if self.last_row else normed
        x = self._newest(x) if self.last_row else x
        x = x + self.out(self._attend(queries, normed))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out

    def _newest(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.tokens, rows.shape[1])[:, -1]

    def _attend(self, queries: Tensor, tokens: Tensor) -> Tensor:
        batch = tokens.shape[0] // self.tokens
        q = self._split(self.query(queries), batch)
        k, v = (self._split(part, batch) for part in self.key_value(tokens).chunk(2, dim=1))
        scores = (q @ k.transpose(-1, -2)).float()  # (B, heads, rows, T)
        if self.mask is not None:
            scores = scores + self.mask
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v
        return mixed.transpose(1, 2).reshape(queries.shape)

    def _split(self, rows: Tensor, batch: int) -> Tensor:
        """(B * R, D) -> (B, heads, R, D / heads)."""
        return rows.reshape(batch, -1, self.heads, rows.shape[1] // self.heads).transpose(1, 2)


class GptStage(nn.Module):
    """Window of frame tokens and states -> feature of the current action query."""

    constants: Tensor

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        trunk, config = checkpoint.network.vqbet, checkpoint.config
        parts = trunk.policy.transformer
        self.dtype = dtype
        embedding = token_embedding(checkpoint)
        projector = AffineMap.of(trunk.state_projector[0])
        self.project_state = embedding.after(projector).layer(torch.float32)
        window, per_step = config.n_obs_steps, config.tokens_per_step
        tokens = window * per_step
        positions = parts["wpe"].weight[:tokens].detach()  # type: ignore[index]
        query = F.linear(trunk.action_token[0, 0], *embedding)
        constants = positions.clone().view(window, per_step, -1)
        constants[:, -1] += query.detach()
        self.register_buffer("constants", constants)  # (N, K + 2, D)
        blocks = list(parts["h"])  # type: ignore[call-overload]
        self.blocks = nn.Sequential(
            *(_Block(block, tokens, dtype, last_row=block is blocks[-1]) for block in blocks)
        )
        self.norm = _Norm(parts["ln_f"])  # type: ignore[arg-type]
        self.lm_head = AffineMap.of(trunk.policy.lm_head).layer(dtype)

    def forward(self, image_tokens: Tensor, states: Tensor) -> Tensor:
        """float32 (B, N, K, D) and (B, N, S), normalised -> float32 (B, gpt_output_dim)."""
        state_tokens = self.project_state(states)[:, :, None]
        queries = torch.zeros_like(state_tokens)
        steps = torch.cat([image_tokens, state_tokens, queries], dim=2) + self.constants
        x = self.blocks(steps.flatten(0, 2).to(self.dtype))  # (B, D)
        return self.lm_head(self.norm(x)).float()  # type: ignore[no-any-return]


class CodeHeadsStage(nn.Module):
    """Feature -> code logits and the offset of every code.

    When codes are selected sequentially, the secondary logits lack the primary code's part:
    `secondary_columns` has it.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        head = checkpoint.network.head
        self.dtype, self.codes, self.offset_shape = dtype, head.num_codes, head.offset_shape
        if head.sequential:
            first = AffineMap.of(head.map_to_cbet_preds_primary_bin[0])
            second = AffineMap.of(head.map_to_cbet_preds_secondary_bin[0])
            width = checkpoint.config.gpt_output_dim
            logits = AffineMap(
                torch.cat([first.weight, second.weight[:, :width]]),
                torch.cat([first.bias, second.bias]),
            )
        else:
            logits = AffineMap.of(head.map_to_cbet_preds_bin[0])
        self.logits = logits.layer(dtype)
        self.offsets = AffineMap.of(head.map_to_cbet_preds_offset[0]).layer(dtype)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, gpt_output_dim) -> float32 (B, 2, C) and (B, 2, C, W, A)."""
        x = feature.to(self.dtype)
        logits = self.logits(x).float().reshape(-1, NUM_CODE_LAYERS, self.codes)
        return logits, self.offsets(x).float().reshape(-1, *self.offset_shape)


class RvqDecoderStage(nn.Module):
    """Code pairs -> action chunks."""

    primary: Tensor
    secondary: Tensor

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        vqvae = checkpoint.network.head.vqvae_model
        primary, secondary = vqvae.vq_layer.codebooks
        self.dtype, self.chunk_shape = dtype, vqvae.chunk_shape
        self.register_buffer("primary", primary.embed[0].clone())  # (C, latent)
        self.register_buffer("secondary", secondary.embed[0].clone())
        self.decoder = copy.deepcopy(vqvae.decoder).to(dtype)

    def forward(self, codes: Tensor) -> Tensor:
        """int64 (B, 2) -> float32 (B, W, A), normalised."""
        latents = F.embedding(codes[:, 0], self.primary) + F.embedding(codes[:, 1], self.secondary)
        return self.decoder(latents.to(self.dtype)).float().reshape(-1, *self.chunk_shape)  # type: ignore[no-any-return]


def decode_table(checkpoint: Checkpoint) -> Tensor:
    """float32 (C, C, W, A): the chunk of every code pair, primary first."""
    codes = torch.arange(checkpoint.config.vqvae_n_embed)
    return checkpoint.network.head.vqvae_model.decode(torch.cartesian_prod(codes, codes)).reshape(
        len(codes), len(codes), *checkpoint.network.head.vqvae_model.chunk_shape
    )


def secondary_columns(checkpoint: Checkpoint) -> Tensor:
    """float32 (C, C): row p is what the primary code p adds to the secondary logits."""
    layer = AffineMap.of(checkpoint.network.head.map_to_cbet_preds_secondary_bin[0])
    return layer.weight[:, checkpoint.config.gpt_output_dim :].T.contiguous()
