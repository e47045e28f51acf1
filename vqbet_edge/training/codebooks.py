"""How codebooks learn: k-means to begin with, moving averages, revival of unused codes.

Moving averages follow "Neural Discrete Representation Learning", appendix A.1, with the decay and
smoothing of LeRobot's `EuclideanCodebook`; revival is that of "Jukebox", section 3.1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqbet_edge.training.network import Codebook, ResidualQuantizer, VqVae

EMA_DECAY = 0.8
EMA_EPSILON = 1e-5
KMEANS_ITERATIONS = 20
# A code is dead when it gets less than this share of what it would get if all were used alike.
DEAD_SHARE = 0.05

# Sums a tensor over all processes.
Reduce = Callable[[Tensor], Tensor]


class Quantization(NamedTuple):
    """Result of residual quantisation while training."""

    latents: Tensor  # (M, D), gradients go straight through to the input
    codes: Tensor  # int64 (M, 2)
    commitment: Tensor  # (), how far the input is from its code vectors, summed over layers


def quantize(quantizer: ResidualQuantizer, latents: Tensor, reduce: Reduce | None) -> Quantization:
    """Quantise latents (M, D) and, unless `reduce` is None, move the code vectors towards them.

    `reduce` keeps the codebooks in step across processes.
    """
    residual, total, codes = latents, torch.zeros_like(latents), []
    commitment = latents.new_zeros(())
    for codebook in quantizer.codebooks:
        code = codebook.nearest(residual.detach())
        chosen = codebook.embed[0, code]
        commitment = commitment + F.mse_loss(residual, chosen)
        # Every layer passes the gradient on, as in LeRobot.
        total = total + residual + (chosen - residual).detach()
        if reduce is not None:
            _move(codebook, residual.detach(), code, reduce)
        residual = residual - chosen
        codes.append(code)
    return Quantization(total, torch.stack(codes, dim=-1), commitment)


@torch.no_grad()
def _move(codebook: Codebook, x: Tensor, codes: Tensor, reduce: Reduce) -> None:
    size = codebook.embed.shape[1]
    one_hot = F.one_hot(codes, size).to(x.dtype)
    codebook.cluster_size.lerp_(reduce(one_hot.sum(0))[None], 1 - EMA_DECAY)
    codebook.embed_avg.lerp_(reduce(one_hot.T @ x)[None], 1 - EMA_DECAY)
    counts = codebook.cluster_size
    smoothed = (counts + EMA_EPSILON) / (counts.sum() + size * EMA_EPSILON) * counts.sum()
    codebook.embed.copy_(codebook.embed_avg / smoothed[..., None])


@torch.no_grad()
def initialize(vqvae: VqVae, chunks: Tensor, batch_size: int) -> None:
    """Place the code vectors by k-means over the latents of chunks (M, W, A), normalised.

    The chunks are the same on all processes; `batch_size`, those of a training step, is the scale
    of the moving counts.
    """
    residual = vqvae.encoder(chunks.flatten(1))
    for codebook in vqvae.vq_layer.codebooks:
        size = codebook.embed.shape[1]
        _place(codebook, torch.arange(size), _spread(residual, size), batch_size / size)
        for _ in range(KMEANS_ITERATIONS):
            one_hot = F.one_hot(codebook.nearest(residual), size).to(residual.dtype)
            counts = one_hot.sum(0)
            means = one_hot.T @ residual / counts.clamp(min=1)[:, None]
            codebook.embed[0] = torch.where(counts[:, None] > 0, means, codebook.embed[0])
        codebook.cluster_size[0] = counts * (batch_size / len(residual))
        codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[..., None])
        residual = residual - codebook.embed[0, codebook.nearest(residual)]


@torch.no_grad()
def revive(vqvae: VqVae, chunks: Tensor) -> int:
    """Put codes that are hardly ever chosen where the worst represented chunks are.

    Of chunks (M, W, A), normalised, the same on all processes; returns how many codes were dead.
    """
    residual, revived = vqvae.encoder(chunks.flatten(1)), 0
    for codebook in vqvae.vq_layer.codebooks:
        share = codebook.cluster_size[0].mean()
        dead = (codebook.cluster_size[0] < DEAD_SHARE * share).nonzero()[:, 0]
        left = residual - codebook.embed[0, codebook.nearest(residual)]
        if len(dead):
            worst = left.norm(dim=-1).topk(min(len(left), 16 * len(dead))).indices
            _place(codebook, dead, _spread(residual[worst], len(dead)), float(share))
            left = residual - codebook.embed[0, codebook.nearest(residual)]
        residual, revived = left, revived + len(dead)
    return revived


def _spread(points: Tensor, count: int) -> Tensor:
    """(M, D) -> (count, D): points far from each other, the first one the farthest out."""
    chosen = [points[points.norm(dim=-1).argmax()]]
    nearest = (points - chosen[0]).norm(dim=-1)
    for _ in range(count - 1):
        chosen.append(points[nearest.argmax()])
        nearest = torch.minimum(nearest, (points - chosen[-1]).norm(dim=-1))
    return torch.stack(chosen)


def _place(codebook: Codebook, codes: Tensor, vectors: Tensor, count: float) -> None:
    codebook.embed[0, codes] = vectors
    codebook.cluster_size[0, codes] = count
    codebook.embed_avg[0, codes] = vectors * count
