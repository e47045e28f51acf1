"""What the two phases minimise, on one batch.

Losses, weights and the order of random draws are those of LeRobot's `VqVae.vqvae_forward` and
`VQBeTHead.loss_fn`: fed the same batch, weights and random state, both agree.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.codebooks import Reduce, quantize
from vqbet_edge.training.draws import Shard, drawn, sampled
from vqbet_edge.training.network import ActionHead, VQBeT, VqVae, full_precision
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

    def forward(self, chunks: Tensor, shard: Shard | None = None) -> VqVaeLosses:  # noqa: ARG002
        """Losses on chunks (M, W, A), normalised; moves the codebooks in training mode.

        Nothing is drawn at random, whatever shard of a batch they are.
        """
        flat = chunks.flatten(1)  # (M, W * A)
        reduce = self._reduce if self.training else None
        with full_precision(flat):
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

    def __init__(
        self, network: VQBeT, scalings: Scalings, *, crop_per_sample: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self._crop_per_sample = crop_per_sample
        self.pixels = PixelScaling([scalings.forward[key] for key in network.config.image_keys])

    def train(self, mode: bool = True) -> "PolicyObjective":
        """Switch the mode of everything but the VQ-VAE, which stays as phase 1 left it."""
        super().train(mode)
        self.network.head.vqvae_model.eval()
        return self

    def forward(
        self, images: Tensor, states: Tensor, chunks: Tensor, shard: Shard | None = None
    ) -> PolicyLosses:
        """Losses on one batch, or a shard of one; see `Batch` for the shapes."""
        config, head = self.network.config, self.network.head
        pixels = self.pixels(self._crop(images, shard))
        features = self.network(pixels, states, shard).flatten(0, 1)  # (B * Q, D)
        chunks = chunks.flatten(0, 1)  # (B * Q, W, A)
        with torch.no_grad(), full_precision(chunks):
            target = head.vqvae_model.encode(chunks).codes
        predicted = predict(head, features, config.bet_softmax_temperature, shard)
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

    def _crop(self, images: Tensor, shard: Shard | None) -> Tensor:
        """uint8 (B, N, K, H, W, 3) -> (B, N, K, *crop, 3), before a pixel becomes four bytes."""
        config = self.network.config
        if config.crop_shape is None:
            return images
        if self.training and config.crop_is_random:
            return random_crop(images, config.crop_shape, shard, each=self._crop_per_sample)
        centre: Tensor = self.network.vqbet.rgb_encoder.center_crop(images.movedim(-1, -3))
        return centre.movedim(-3, -1).contiguous()


def random_crop(
    images: Tensor, size: tuple[int, int], shard: Shard | None, *, each: bool
) -> Tensor:
    """(B, ..., H, W, 3) -> (B, ..., *size, 3), at one place as torchvision's `RandomCrop` draws it.

    With `each`, at a place for every window, the same for all its frames.
    """
    for axis, side in zip((-3, -2), size, strict=True):
        end = images.shape[axis] - side + 1
        if end == 1:
            continue
        within = torch.arange(side, device=images.device)
        if each:
            windows = torch.arange(len(images), device=images.device)
            places = drawn(windows, shard, partial(torch.randint_like, high=end))
            lines = places[:, None] + within
            images = images.movedim(axis, 1)[windows[:, None], lines].movedim(1, axis)
        else:
            # Not an int: the host would wait for it.
            place = torch.randint(end, (), device=images.device)
            images = images.index_select(axis, place + within)
    return images.contiguous()


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


def predict(
    head: ActionHead, features: Tensor, temperature: float, shard: Shard | None = None
) -> Prediction:
    """Sample codes for features (M, D) and predict their chunks."""

    def sample(logits: Tensor) -> Tensor:  # (R, C) -> int64 (R,)
        return sampled((logits.detach().float() / temperature).softmax(dim=-1), shard)

    logits = head.code_logits(features)
    if head.sequential:
        primary = sample(logits[:, 0])
        logits = head.code_logits(features, primary)
        codes = torch.stack([primary, sample(logits[:, 1])], dim=-1)
    else:
        codes = sample(logits.flatten(0, 1)).view(-1, 2)  # from (2 * M,)
    return Prediction(logits, codes, head.action_chunk(features, codes))


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Of logits (M, C) and int64 (M,), without class weights.

    "Focal Loss for Dense Object Detection", equation 4.
    """
    log_probability = F.log_softmax(logits, dim=-1).gather(-1, target[:, None])[:, 0]
    return -((1 - log_probability.exp()) ** FOCAL_GAMMA * log_probability).mean()
