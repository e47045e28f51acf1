"""Residual VQ-VAE over action chunks (paper, section 3.1), tensors laid out as in LeRobot.

Residual quantisation follows "SoundStream", algorithm 1: each layer quantises what the layers
before it left over.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqbet_edge.model.config import NUM_CODE_LAYERS, VQBeTConfig


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
