"""The four cuts of Robot Utility Models and Contact-Anchored Policies.

Letters as in `stages`, with K = P = 1: the one camera's frame is the one token of a step, and a
goal is added to it.

Differences from the network for reference, all exact but for rounding:
- scaling of uint8 and ImageNet's statistics are part of the encoder; the bicubic interpolation is
  two constant matrices there, as it is linear in rows and in columns;
- the adapters of frame and goal are multiplied through the token embedding `wte`, which is linear
  in both;
- the first layer of the secondary head is affine in the primary code's one-hot, so its part of
  every code is a constant, and the layers behind it run for all codes at once;
- and what `stages` says of the transformer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.training.nyu import NyuCheckpoint
from vqbet_edge.training.nyu_network import CAMERA_SIZE, ENCODER_SIZE, Heads, NyuVQBeT
from vqbet_export.folding import AffineMap, fold_batch_norms
from vqbet_export.stages import CachedGptStage, Cuts, GptParts, GptStage, RvqDecoderStage


def nyu_cuts(checkpoint: NyuCheckpoint) -> Cuts:
    """Those of such a checkpoint."""
    network, steps = checkpoint.network, checkpoint.config.n_obs_steps
    positions: Tensor = network.gpt.transformer["wpe"].weight  # type: ignore[assignment]
    constants = positions.detach()[:steps, None].clone()
    _, goal = _embedding(network)
    parts = GptParts(network.gpt, goal, constants)
    gpt, cached = (GptStage, CachedGptStage) if goal else (_GptOfFrames, _CachedGptOfFrames)
    return Cuts(
        {
            "vision_encoder": lambda dtype: VisionEncoderStage(network, dtype),
            "gpt": lambda dtype: gpt(parts, dtype),
            "code_heads": lambda dtype: CodeHeadsStage(network.head, dtype),
            "rvq_decoder": lambda dtype: RvqDecoderStage(network.head.vqvae_model, dtype),
        },
        lambda dtype: cached(parts, dtype),
        constants,
    )


def _embedding(network: NyuVQBeT) -> tuple[AffineMap, AffineMap | None]:
    """From an encoder's features to a token, and from a goal to what it adds to that."""
    wide, width = AffineMap.of(network.gpt.transformer["wte"]), network.config.goal_width
    frame = AffineMap(wide.weight[:, width:], wide.bias).after(AffineMap.of(network.obs_adapter))
    if network.goal_adapter is None:
        return frame, None
    goal = AffineMap(wide.weight[:, :width], torch.zeros_like(wide.bias))
    return frame, goal.after(AffineMap.of(network.goal_adapter))


def bicubic_matrix() -> Tensor:
    """float32 (ENCODER_SIZE, CAMERA_SIZE): torch's interpolation of one row of pixels.

    With its rounding: the places that it interpolates at are float32, as far off as 1e-5 of a
    picture, which a deep encoder magnifies.
    """
    lit = torch.eye(CAMERA_SIZE)[:, None, None]  # (CAMERA_SIZE, 1, 1, CAMERA_SIZE), one pixel each
    rows = F.interpolate(lit, (1, ENCODER_SIZE), mode="bicubic", antialias=False)
    return rows[:, 0, 0].T.contiguous()


class VisionEncoderStage(nn.Module):
    """Camera frames -> tokens of the transformer's width."""

    matrix: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, network: NyuVQBeT, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.bicubic = dtype, network.config.bicubic
        self.register_buffer("matrix", bicubic_matrix())
        self.register_buffer("scale", 1 / (255 * network.std))
        self.register_buffer("shift", -network.mean / network.std)
        self.backbone = fold_batch_norms(network.encoder).to(dtype)
        self.project = _embedding(network)[0].layer(dtype)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W, 3), cropped -> float32 (B, 1, D)."""
        # TensorRT takes uint8 at a graph's border only, so the cast comes first.
        images = frames.float().permute(0, 1, 4, 2, 3).flatten(0, 1)
        if self.bicubic:
            # A constant on the right of a product would be taken for a layer to quantise.
            images = (self.matrix @ (self.matrix @ images).mT).mT
        images = images * self.scale + self.shift
        tokens = self.project(self.backbone(images.to(self.dtype)))
        return tokens.float().reshape(*frames.shape[:2], -1)  # type: ignore[no-any-return]


class _GptOfFrames(GptStage):
    """Of a policy that observes its camera alone."""

    def forward(self, image_tokens: Tensor) -> Tensor:  # type: ignore[override]
        """float32 (B, N, 1, D) -> float32 (B, gpt_output_dim)."""
        return super().forward(image_tokens)


class _CachedGptOfFrames(CachedGptStage):
    """Likewise."""

    def forward(  # type: ignore[override]
        self, image_tokens: Tensor, constants: Tensor, mask: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `CachedGptStage`."""
        return super().forward(image_tokens, None, constants, mask, past)


class CodeHeadsStage(nn.Module):
    """Feature -> code logits, the secondary ones given every primary code, and all offsets."""

    columns: Tensor

    def __init__(self, head: Heads, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.codes, self.offset_shape = dtype, head.num_codes, head.offset_shape
        self.primary = _layers(head.primary, dtype)
        first, *rest = head.secondary
        weight, bias = AffineMap.of(first)
        width = weight.shape[1] - head.num_codes
        self.given = AffineMap(weight[:, :width], bias).layer(dtype)
        # (C, hidden), row p is what the primary code p adds.
        self.register_buffer("columns", weight[:, width:].T.to(dtype).contiguous())
        self.secondary = _layers(nn.Sequential(*rest), dtype)
        self.offsets = _layers(head.offset, dtype)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, gpt_output_dim) -> float32 (B, 1 + C, C) and (B, 2, C, W, A)."""
        x = feature.to(self.dtype)
        hidden = (self.given(x)[:, None] + self.columns).flatten(0, 1)  # (B * C, hidden)
        secondary = self.secondary(hidden).reshape(-1, self.codes, self.codes)
        logits = torch.cat([self.primary(x)[:, None], secondary], dim=1).float()
        return logits, self.offsets(x).float().reshape(-1, *self.offset_shape)


def _layers(layers: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    """A copy whose numbers are of a type."""
    return nn.Sequential(
        *(
            AffineMap.of(layer).layer(dtype) if isinstance(layer, nn.Linear) else nn.ReLU()
            for layer in layers
        )
    )
