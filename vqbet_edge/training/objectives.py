"""What the two phases minimise, on one batch.

Losses, weights and the order of random draws are those of LeRobot's `VqVae.vqvae_forward` and
`VQBeTHead.loss_fn`: fed the same batch, weights and random state, both agree.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.codebooks import Reduce, quantize
from vqbet_edge.training.network import ActionHead, VQBeT, VqVae
from vqbet_edge.training.normalization import Scalings

COMMITMENT_WEIGHT = 5.0
FOCAL_GAMMA = 2.0


class VqVaeLosses(NamedTuple):
    """Losses of the residual VQ-VAE, all ()."""

    loss: Tensor
    reconstruction: Tensor  # L1 of the normalised chunks
    commitment: Tensor


class VqVaeObjective(nn.Module):
    """Phase 1: action chunk -> codes -> the same action chunk."""

    names = VqVaeLosses._fields

    def __init__(self, vqvae: VqVae, reduce: Reduce) -> None:
        super().__init__()
        self.vqvae = vqvae
        self._reduce = reduce

    def forward(self, chunks: Tensor) -> VqVaeLosses:
        """Losses on chunks (M, W, A), normalised; moves the codebooks in training mode."""
        flat = chunks.flatten(1)  # (M, W * A)
        reduce = self._reduce if self.training else None
        result = quantize(self.vqvae.vq_layer, self.vqvae.encoder(flat), reduce)
        reconstruction = F.l1_loss(self.vqvae.decoder(result.latents), flat)
        loss = reconstruction + COMMITMENT_WEIGHT * result.commitment
        return VqVaeLosses(loss, reconstruction.detach(), result.commitment.detach())


class PolicyLosses(NamedTuple):
    """Losses of code prediction and offsets, all ()."""

    loss: Tensor
    primary: Tensor  # focal loss of the primary code
    secondary: Tensor
    offset: Tensor  # L1 of the predicted chunk, normalised
    primary_accuracy: Tensor  # share of the sampled codes that are the chunk's own
    secondary_accuracy: Tensor


class PolicyObjective(nn.Module):
    """Phase 2: window -> codes and offsets of all action queries."""

    names = PolicyLosses._fields

    def __init__(self, network: VQBeT, scalings: Scalings) -> None:
        super().__init__()
        self.network = network
        self.pixels = PixelScaling([scalings.forward[key] for key in network.config.image_keys])

    def train(self, mode: bool = True) -> "PolicyObjective":
        """Switch the mode of everything but the VQ-VAE, which stays as phase 1 left it."""
        super().train(mode)
        self.network.head.vqvae_model.eval()
        return self

    def forward(self, images: Tensor, states: Tensor, chunks: Tensor) -> PolicyLosses:
        """Losses on one batch; see `Batch` for the shapes."""
        config, head = self.network.config, self.network.head
        features = self.network(self.pixels(images), states).flatten(0, 1)  # (B * Q, D)
        chunks = chunks.flatten(0, 1)  # (B * Q, W, A)
        # The codes of a chunk must not depend on the precision that the rest runs in.
        with torch.no_grad(), torch.autocast(chunks.device.type, enabled=False):
            target = head.vqvae_model.encode(chunks).codes
        predicted = predict(head, features, config.bet_softmax_temperature)
        primary = focal_loss(predicted.logits[:, 0], target[:, 0])
        secondary = focal_loss(predicted.logits[:, 1], target[:, 1])
        offset = F.l1_loss(predicted.chunks, chunks)
        loss = (
            config.primary_code_loss_weight * primary
            + config.secondary_code_loss_weight * secondary
            + config.offset_loss_weight * offset
        )
        hits = (predicted.codes == target).float().mean(0)
        return PolicyLosses(loss, primary.detach(), secondary.detach(), offset.detach(), *hits)


class PixelScaling(nn.Module):
    """Camera frames -> what the network takes: one factor and summand per camera and channel."""

    multiply: Tensor
    add: Tensor

    def __init__(self, scalings: Sequence[Affine]) -> None:
        super().__init__()
        # In float64 until both terms are final.
        rows = [np.stack([s.subtract, s.multiply, s.add]).astype(np.float64) for s in scalings]
        subtract, multiply, add = np.stack(rows, axis=1)[..., None, None]  # (K, 3, 1, 1) each
        dtype = torch.get_default_dtype()
        self.register_buffer("multiply", torch.tensor(multiply / 255, dtype=dtype))
        self.register_buffer("add", torch.tensor(add - subtract * multiply, dtype=dtype))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (..., K, H, W, 3) -> float32 (..., K, 3, H, W), normalised."""
        return images.movedim(-1, -3).float() * self.multiply + self.add


class Prediction(NamedTuple):
    """What the heads say about M action queries."""

    logits: Tensor  # (M, 2, C)
    codes: Tensor  # int64 (M, 2), sampled
    chunks: Tensor  # (M, W, A), decoded plus offset


def predict(head: ActionHead, features: Tensor, temperature: float) -> Prediction:
    """Sample codes for features (M, D) and predict their chunks."""
    logits = head.code_logits(features)
    if head.sequential:
        primary = _sample(logits[:, 0], temperature)
        logits = head.code_logits(features, primary)
        codes = torch.stack([primary, _sample(logits[:, 1], temperature)], dim=-1)
    else:
        codes = _sample(logits.flatten(0, 1), temperature).view(-1, 2)  # from (2 * M,)
    return Prediction(logits, codes, head.action_chunk(features, codes))


def _sample(logits: Tensor, temperature: float) -> Tensor:
    """(M, C) -> int64 (M,)."""
    probabilities = (logits.detach().float() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, num_samples=1)[:, 0]


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Of logits (M, C) and int64 (M,), without class weights.

    "Focal Loss for Dense Object Detection", equation 4.
    """
    log_probability = F.log_softmax(logits, dim=-1).gather(-1, target[:, None])[:, 0]
    return -((1 - log_probability.exp()) ** FOCAL_GAMMA * log_probability).mean()
