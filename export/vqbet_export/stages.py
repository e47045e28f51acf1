"""The policy cut into four inference modules: LeRobot's, and what all families share.

Letters in shapes: B batch, N window, K cameras, H and W height and width of a frame as the runtime
crops it, S width of the state or goal, D `gpt_hidden_dim`, P tokens of a step, T of a window, C
codes per layer, W actions per chunk, A action width.

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
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import NUM_CODE_LAYERS
from vqbet_edge.training.description import center_crop
from vqbet_edge.training.network import GPT, Block, PairDecoder
from vqbet_edge.training.resizing import shrink, shrink_cameras
from vqbet_export.folding import AffineMap, fold_batch_norms

Modules = Mapping[StageName, Callable[[torch.dtype], nn.Module]]


class Cuts(NamedTuple):
    """A policy as inference modules, which are made in a type of number."""

    stages: Modules  # of all four
    cached_gpt: Callable[[torch.dtype], "CachedGptStage"]
    constants: Tensor  # float32 (N, P, D), what every token has from its place


def lerobot_cuts(checkpoint: Checkpoint) -> Cuts:
    """Those of a LeRobot checkpoint."""
    trunk, constants = checkpoint.network.vqbet, token_constants(checkpoint)
    vqvae = checkpoint.network.head.vqvae_model
    projector = AffineMap.of(trunk.state_projector[0])
    parts = GptParts(trunk.policy, token_embedding(checkpoint).after(projector), constants)
    return Cuts(
        {
            "vision_encoder": lambda dtype: VisionEncoderStage(checkpoint, dtype),
            "gpt": lambda dtype: GptStage(parts, dtype),
            "code_heads": lambda dtype: CodeHeadsStage(checkpoint, dtype),
            "rvq_decoder": lambda dtype: RvqDecoderStage(vqvae, dtype),
        },
        lambda dtype: CachedGptStage(parts, dtype),
        constants,
    )


# Finite, so that no row of the softmax can become NaN; below any score; within float16.
MASKED_SCORE = -1e4


def token_embedding(checkpoint: Checkpoint) -> AffineMap:
    """The transformer's token embedding `wte`."""
    return AffineMap.of(checkpoint.network.vqbet.policy.transformer["wte"])


class VisionEncoderStage(nn.Module):
    """Camera frames -> tokens of the transformer's width."""

    scale: Tensor
    shift: Tensor
    pos_grid: Tensor

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        trunk, config = checkpoint.network.vqbet, checkpoint.config
        self.dtype, self.resize_shape = dtype, config.resize_shape
        self.sizes = config.image_sizes if config.cameras_differ else None
        crop = center_crop(config.resize_shape or config.encoder_shape, config.encoder_shape)
        self.rows, self.columns = crop.rows, crop.columns
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
        images = frames.float().permute(0, 1, 4, 2, 3)
        if self.sizes is not None and self.resize_shape is not None:
            images = shrink_cameras(images, self.sizes, self.resize_shape)
        images = images * self.scale
        if self.shifted:
            images = images + self.shift
        images = images.flatten(0, 1)
        if self.resize_shape is not None:
            images = shrink(images, self.resize_shape)[..., self.rows, self.columns]
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

    def __init__(self, block: Block, dtype: torch.dtype, *, last_row: bool) -> None:
        super().__init__()
        self.last_row, self.heads = last_row, block.attn.num_heads
        self.norm_1, self.norm_2 = _Norm(block.ln_1), _Norm(block.ln_2)
        weight, bias = AffineMap.of(block.attn.c_attn)
        width = weight.shape[1]
        scale = 1 / math.sqrt(width // self.heads)
        self.query = AffineMap(weight[:width] * scale, bias[:width] * scale).layer(dtype)
        self.key_value = AffineMap(weight[width:], bias[width:]).layer(dtype)
        self.out = AffineMap.of(block.attn.c_proj).layer(dtype)
        self.mlp = copy.deepcopy(block.mlp[:3]).to(dtype)

    def forward(
        self, x: Tensor, mask: Tensor, batch: int, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block over a window or its end.

        Args:
            x: (B * T, D).
            mask: float32 (T, P + T), added to the scores.
            batch: B.
            past: keys and values of the P tokens before, (B, heads, P, D / heads).

        Returns:
            (B * T, D), or (B, D) with `last_row`, and the T tokens' keys and values.
        """
        normed = self.norm_1(x)
        queries = self._newest(normed, batch) if self.last_row else normed
        x = self._newest(x, batch) if self.last_row else x
        # Made contiguous, which costs no node, they are split without asking for T at run time.
        both = (part.contiguous() for part in self.key_value(normed).chunk(2, dim=1))
        k, v = (self._split(part, batch) for part in both)
        keys, values = (k, v) if past is None else _behind(past, (k, v))
        q = self._split(self.query(queries), batch)
        scores = (q @ keys.transpose(-1, -2)).float()  # (B, heads, rows, P + T)
        if not self.last_row:  # the newest token sees all
            scores = scores + mask
        mixed = scores.softmax(dim=-1).to(v.dtype) @ values
        x = x + self.out(mixed.transpose(1, 2).reshape(queries.shape))
        return x + self.mlp(self.norm_2(x)), k, v

    def _newest(self, rows: Tensor, batch: int) -> Tensor:
        return rows.reshape(batch, -1, rows.shape[1])[:, -1]

    def _split(self, rows: Tensor, batch: int) -> Tensor:
        """(B * R, D) -> (B, heads, R, D / heads)."""
        return rows.reshape(batch, -1, self.heads, rows.shape[1] // self.heads).transpose(1, 2)


def _behind(past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Keys and values of all tokens, in the type of the new ones."""
    return [torch.cat([old.to(n.dtype), n], dim=2) for old, n in zip(past, new, strict=True)]


def causal_mask(tokens: int) -> Tensor:
    """float32 (T, T), added to scores: a token sees itself and those before it."""
    return torch.full((tokens, tokens), MASKED_SCORE).triu(1)


def token_constants(checkpoint: Checkpoint) -> Tensor:
    """float32 (N, K + 2, D): what every token has from its place: position, action query."""
    trunk, config = checkpoint.network.vqbet, checkpoint.config
    window, per_step = config.n_obs_steps, config.tokens_per_step
    query = F.linear(trunk.action_token[0, 0], *token_embedding(checkpoint))
    positions = trunk.policy.transformer["wpe"].weight[: window * per_step]  # type: ignore[index]
    constants: Tensor = positions.detach().clone().view(window, per_step, -1)
    constants[:, -1] += query.detach()
    return constants


class GptParts(NamedTuple):
    """What both GPT stages are made of.

    Attributes:
        gpt: the network's.
        vector: from the state or goal to its token, `wte` included; None without one.
        constants: float32 (N, P, D), what every token has from its place. Of K tokens a step, the
            vector is added to the frames'; of K + 2 it is one of its own, before the query.
    """

    gpt: GPT
    vector: AffineMap | None
    constants: Tensor


class _Transformer(nn.Module):
    """Tokens of some steps -> feature of the newest one; the trunk of both GPT stages."""

    def __init__(self, made_of: GptParts, dtype: torch.dtype) -> None:
        super().__init__()
        parts = made_of.gpt.transformer
        self.dtype, self.per_step = dtype, made_of.constants.shape[1]
        if made_of.vector is not None:
            self.project_state = made_of.vector.layer(torch.float32)
        blocks = list(parts["h"])  # type: ignore[call-overload]
        self.blocks = nn.ModuleList(
            _Block(block, dtype, last_row=block is blocks[-1]) for block in blocks
        )
        self.norm = _Norm(parts["ln_f"])  # type: ignore[arg-type]
        self.lm_head = AffineMap.of(made_of.gpt.lm_head).layer(dtype)

    def tokens(self, image_tokens: Tensor, states: Tensor | None, constants: Tensor) -> Tensor:
        """(B, n, K, D), (B, n, S) and (n, P, D) -> (B * n * P, D)."""
        steps = image_tokens
        if states is not None:
            state_tokens = self.project_state(states)[:, :, None]
            if self.per_step == image_tokens.shape[2]:
                steps = image_tokens + state_tokens
            else:
                # A product, because a tensor of zeros would have to ask for its shape at run time.
                queries = state_tokens * 0
                steps = torch.cat([image_tokens, state_tokens, queries], dim=2)
        return (steps + constants).flatten(0, 2).to(self.dtype)

    def feature(self, x: Tensor) -> Tensor:
        """(B, D) -> float32 (B, gpt_output_dim)."""
        return self.lm_head(self.norm(x)).float()  # type: ignore[no-any-return]


class GptStage(_Transformer):
    """Window of frame tokens and states -> feature of the current step."""

    constants: Tensor
    mask: Tensor

    def __init__(self, made_of: GptParts, dtype: torch.dtype) -> None:
        super().__init__(made_of, dtype)
        self.register_buffer("constants", made_of.constants)
        self.register_buffer("mask", causal_mask(made_of.constants.shape[:2].numel()))

    def forward(self, image_tokens: Tensor, states: Tensor | None = None) -> Tensor:
        """float32 (B, N, K, D) and (B, N, S), normalised -> float32 (B, gpt_output_dim)."""
        x = self.tokens(image_tokens, states, self.constants)
        for block in self.blocks:
            x, _, _ = block(x, self.mask, image_tokens.shape[0])
        return self.feature(x)


# Axes of its inputs that are windows, steps or tokens: a graph serves any number of them.
CACHED_GPT_FREE_AXES = {
    "image_tokens": (0, 1),
    "states": (0, 1),
    "constants": (0,),
    "mask": (0, 1),
    "past": (1, 3),
}


class CachedGptStage(_Transformer):
    """The same for any number of steps behind P tokens whose keys and values are known.

    One graph serves a whole window (P = 0), the known steps ahead of time (P = 0, their keys and
    values are kept) and the last step (P = all others), with one set of weights in memory.
    """

    def forward(
        self,
        image_tokens: Tensor,
        states: Tensor | None,
        constants: Tensor,
        mask: Tensor,
        past: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run over n steps of T tokens.

        Args:
            image_tokens: float32 (B, n, K, D).
            states: float32 (B, n, S), normalised; None of a policy that observes none.
            constants: float32 (n, P, D), these steps' part of `token_constants`.
            mask: float32 (T, P + T), 0 where a token sees another, `MASKED_SCORE` elsewhere.
            past: float32 (2 L, B, heads, P, D / heads), every block's keys, then its values.

        Returns:
            float32 (B, gpt_output_dim), and float32 (2 L, B, heads, T, D / heads).
        """
        x = self.tokens(image_tokens, states, constants)
        present = []
        for layer, block in enumerate(self.blocks):
            known = past[2 * layer], past[2 * layer + 1]
            x, keys, values = block(x, mask, image_tokens.shape[0], known)
            present += [keys, values]
        return self.feature(x), torch.stack(present).float()


class CodeHeadsStage(nn.Module):
    """Feature -> code logits and the offset of every code.

    When codes are selected sequentially, there is a row of secondary logits for every primary code:
    the head is affine in its one-hot.
    """

    columns: Tensor

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        head, width = checkpoint.network.head, checkpoint.config.gpt_output_dim
        self.dtype, self.codes, self.offset_shape = dtype, head.num_codes, head.offset_shape
        if head.sequential:
            first = AffineMap.of(head.map_to_cbet_preds_primary_bin[0])
            second = AffineMap.of(head.map_to_cbet_preds_secondary_bin[0])
            logits = AffineMap(
                torch.cat([first.weight, second.weight[:, :width]]),
                torch.cat([first.bias, second.bias]),
            )
            columns = second.weight[:, width:].T  # (C, C), row p is what the primary code p adds
        else:
            logits = AffineMap.of(head.map_to_cbet_preds_bin[0])
            columns = torch.zeros(1, head.num_codes)
        self.logits = logits.layer(dtype)
        self.offsets = AffineMap.of(head.map_to_cbet_preds_offset[0]).layer(dtype)
        self.register_buffer("columns", columns.detach().clone())

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, gpt_output_dim) -> float32 (B, 1 + R, C) and (B, 2, C, W, A)."""
        x = feature.to(self.dtype)
        logits = self.logits(x).float().reshape(-1, NUM_CODE_LAYERS, self.codes)
        if len(self.columns) > 1:
            logits = torch.cat([logits[:, :1], logits[:, 1:] + self.columns], dim=1)
        return logits, self.offsets(x).float().reshape(-1, *self.offset_shape)


class RvqDecoderStage(nn.Module):
    """Code pairs -> action chunks."""

    primary: Tensor
    secondary: Tensor

    def __init__(self, vqvae: PairDecoder, dtype: torch.dtype) -> None:
        super().__init__()
        primary, secondary = vqvae.code_vectors
        self.dtype, self.chunk_shape = dtype, vqvae.chunk_shape
        self.register_buffer("primary", primary.detach().clone())  # (C, latent)
        self.register_buffer("secondary", secondary.detach().clone())
        self.decoder = copy.deepcopy(vqvae.decoder).to(dtype)

    def forward(self, codes: Tensor) -> Tensor:
        """int64 (B, 2) -> float32 (B, W, A), normalised."""
        latents = F.embedding(codes[:, 0], self.primary) + F.embedding(codes[:, 1], self.secondary)
        return self.decoder(latents.to(self.dtype)).float().reshape(-1, *self.chunk_shape)  # type: ignore[no-any-return]


def decode_table(vqvae: PairDecoder) -> Tensor:
    """float32 (C, C, W, A): the chunk of every code pair, primary first."""
    size = len(vqvae.code_vectors[0])
    codes = torch.arange(size)
    table = vqvae.decode(torch.cartesian_prod(codes, codes))
    return table.reshape(size, size, *vqvae.chunk_shape)
