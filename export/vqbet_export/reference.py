"""The policy in PyTorch, as it was trained: what every export is compared with.

It shares nothing with what it judges: neither the runtime's window nor its scaling, sampling or
decode table. Its definitions are LeRobot's: `populate_queues` and `VQBeTPolicy` for the window, and
for normalisation `Normalize` and `Unnormalize` up to 0.3.3, `_NormalizationMixin` from 0.4 on,
`RelativeActionsProcessorStep` from 0.6 on.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqbet_edge.runtime.bundle import CAUSAL_MASK, TOKEN_CONSTANTS
from vqbet_edge.runtime.cases import PolicyOutputs, prints
from vqbet_edge.runtime.manifest import ACTION_RANGE, STATE_RANGE
from vqbet_edge.training.config import ACTION_KEY, NormalizationMode
from vqbet_edge.training.dataset.samples import Piece
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_edge.training.layouts import Normalization

Floats = NDArray[np.float32]

# Of images at a time, so that a camera's resolution does not decide how much memory is needed.
_MAX_VALUES = 1 << 22
# Pairs of codes whose chunks stand for all.
_MAX_PAIRS = 4096
# An action that hardly changes is computed no more exactly than its size allows.
_LEAST_SPREAD = 0.1
# What is added to the score of a token that must not be seen: float16 holds it.
_UNSEEN = -1e4

# Names of what a mode maps to -1 and 1.
_ENDS = {
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


class Reference(NamedTuple):
    """What the policy computes for the M observations of a piece.

    Letters: N window, K cameras, D `gpt_hidden_dim`, S state width, C codes per layer, R rows of
    secondary logits, W actions per chunk, A action width.
    """

    image_tokens: Floats  # (M, N, K, D): what the GPT sees
    states: Floats  # (M, N, S), normalised: likewise
    logits: Floats  # (M, 1 + R, C): primary, then secondary given each primary code
    offsets: Floats  # (M, 2, C, W, A), normalised: of every code
    outputs: PolicyOutputs


@torch.no_grad()
def run_reference(checkpoint: AnyCheckpoint, piece: Piece) -> Reference:
    """Run the training network over a piece: each frame once, then all windows at once."""
    network, head, config = checkpoint.network, checkpoint.network.head, checkpoint.config
    encoded = _encode(checkpoint, piece)  # (M, K, E)
    scaled = normalized(piece.states, checkpoint.normalization.get(checkpoint.vector_key))
    states = torch.from_numpy(scaled.astype(np.float32))
    windows = _windows(encoded, config.n_obs_steps), _windows(states, config.n_obs_steps)
    features = network.features(*windows)[:, config.n_obs_steps - 1]
    logits, offsets = _all_logits(checkpoint, features), head.offsets(features)
    rows, primary = torch.arange(len(features)), logits[:, 0].argmax(dim=-1)
    given = logits[rows, 1 + primary if head.sequential else 1]
    codes = torch.stack([primary, given.argmax(dim=-1)], dim=-1)
    decoded = head.vqvae_model.decode(codes)
    chosen = offsets[rows, 0, codes[:, 0]] + offsets[rows, 1, codes[:, 1]]
    tokens = network.embed(encoded)
    secondary = logits[:, 1:] - logits[:, 1:].mean(dim=-1, keepdim=True)
    return Reference(
        image_tokens=_windows(tokens, config.n_obs_steps).numpy(),
        states=windows[1].numpy(),
        logits=logits.numpy(),
        offsets=offsets.numpy(),
        outputs=PolicyOutputs(
            frame_tokens=tokens.numpy(),
            feature=features.numpy(),
            logits=torch.stack([logits[:, 0], given], dim=1).numpy(),
            codes=codes.numpy(),
            decoded_chunk=decoded.numpy(),
            offset_chunk=chosen.numpy(),
            actions=_actions(checkpoint, (decoded + chosen).numpy(), piece.states),
            scaled_states=states.numpy(),
            offset_prints=prints(offsets.numpy(), 2),
            logit_prints=prints(secondary.numpy(), 1),
        ),
    )


@torch.no_grad()
def action_spread(checkpoint: AnyCheckpoint, reference: Reference) -> Floats:
    """float32 (A,): deviation of the actions that the policy chooses among, in the robot's units.

    Taken over the chunks of all code pairs, offsets included, at a piece's first observation: how
    the camera moves does not count, nor how wide the scaling is.
    """
    head = checkpoint.network.head
    codes = code_pairs(checkpoint)
    offsets = torch.from_numpy(reference.offsets[0])
    chunks = head.vqvae_model.decode(codes) + offsets[0, codes[:, 0]] + offsets[1, codes[:, 1]]
    flat = chunks.flatten(0, 1).double().numpy()
    unit = unnormalized(np.ones(flat.shape[-1]), checkpoint.normalization.get(ACTION_KEY))
    unit -= unnormalized(np.zeros(flat.shape[-1]), checkpoint.normalization.get(ACTION_KEY))
    size = np.maximum(flat.std(axis=0), _LEAST_SPREAD * np.sqrt((flat**2).mean(axis=0)))
    spread: Floats = np.abs(size * unit).astype(np.float32)
    return spread


@torch.no_grad()
def constants(checkpoint: AnyCheckpoint) -> dict[str, Floats]:
    """What a bundle's runtime needs as arrays, by name, from the network's own parts."""
    tokens = checkpoint.config.n_obs_steps * checkpoint.config.tokens_per_step
    ranges = {STATE_RANGE: checkpoint.state_range, ACTION_RANGE: checkpoint.action_range}
    return {
        **{name: found for name, found in ranges.items() if found is not None},
        TOKEN_CONSTANTS: checkpoint.network.places().numpy(),
        CAUSAL_MASK: np.where(np.tri(tokens) > 0, 0, _UNSEEN).astype(np.float32),
    }


def code_pairs(checkpoint: AnyCheckpoint) -> Tensor:
    """int64 (P, 2): all code pairs; of a large codebook as many, spread evenly."""
    size = checkpoint.config.vqvae_n_embed
    pairs = torch.linspace(0, size**2 - 1, min(size**2, _MAX_PAIRS)).long()
    return torch.stack([pairs // size, pairs % size], dim=1)


def normalized(values: NDArray[np.floating], how: Normalization | None) -> NDArray[np.float64]:
    """(..., dim) in the robot's units -> the network's, as LeRobot does."""
    wide = values.astype(np.float64)
    if how is None or how.mode is NormalizationMode.IDENTITY:
        return wide
    if how.mode is NormalizationMode.MEAN_STD:
        return (wide - _stat(how, "mean")) / (_stat(how, "std") + how.epsilon.value)
    low, high = (_stat(how, name) for name in _ENDS[how.mode])
    if how.epsilon.always:  # up to 0.3
        return (wide - low) / (high - low + how.epsilon.value) * 2 - 1
    return 2 * (wide - low) / _span(how, low, high) - 1


def unnormalized(values: NDArray[np.floating], how: Normalization | None) -> NDArray[np.float64]:
    """(..., dim) in the network's units -> the robot's, as LeRobot does."""
    wide = values.astype(np.float64)
    if how is None or how.mode is NormalizationMode.IDENTITY:
        return wide
    if how.mode is NormalizationMode.MEAN_STD:
        return wide * _stat(how, "std") + _stat(how, "mean")
    low, high = (_stat(how, name) for name in _ENDS[how.mode])
    # The guard against a range of zero is in the inverse from 0.4 on.
    span = high - low if how.epsilon.always else _span(how, low, high)
    return (wide + 1) / 2 * span + low


def _stat(how: Normalization, name: str) -> NDArray[np.float64]:
    return np.asarray(how.stats[name], np.float64).reshape(-1)


def _span(
    how: Normalization, low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.where(high == low, how.epsilon.value, high - low)


def _actions(checkpoint: AnyCheckpoint, chunks: Floats, states: Floats) -> Floats:
    """Chunks (M, W, A), normalised -> the robot's units; relative ones from their state on."""
    actions = unnormalized(chunks, checkpoint.normalization.get(ACTION_KEY))
    for i, relative in enumerate(checkpoint.config.relative_actions):
        if relative:
            actions[..., i] += states[:, None, i].astype(np.float64)
    return actions.astype(np.float32)


def _all_logits(checkpoint: AnyCheckpoint, features: Tensor) -> Tensor:
    """(M, F) -> (M, 1 + R, C): the secondary logits given every primary code."""
    head = checkpoint.network.head
    if not head.sequential:
        return head.code_logits(features)
    given = torch.arange(head.num_codes)
    every = head.code_logits(
        features[:, None].expand(-1, len(given), -1), given.expand(len(features), -1)
    )  # (M, C, 2, C)
    return torch.cat([every[:, :1, 0], every[:, :, 1]], dim=1)


def _encode(checkpoint: AnyCheckpoint, piece: Piece) -> Tensor:
    """(M, K, E): every frame, encoded."""
    network = checkpoint.network
    # The same pixels as after scaling, and only they are ever float.
    frames = network.crop(torch.from_numpy(piece.frames).permute(0, 1, 4, 2, 3))  # (M, K, 3, H, W)
    rows = max(1, _MAX_VALUES // frames[0].numel())
    images = (_images(part, checkpoint)[:, None] for part in torch.split(frames, rows))
    return torch.cat([network.encode_images(part)[:, 0] for part in images])


def _images(frames: Tensor, checkpoint: AnyCheckpoint) -> Tensor:
    """uint8 (M, K, 3, H, W) -> float32, normalised."""
    images = frames / 255
    for k, key in enumerate(checkpoint.image_keys):
        # An affine map is known by what it makes of 0 and 1.
        how, channels = checkpoint.normalization.get(key), np.ones(frames.shape[2])
        zero, one = (normalized(channels * x, how) for x in (0, 1))
        scale, shift = (torch.from_numpy(x).float().view(-1, 1, 1) for x in (one - zero, zero))
        images[:, k] = images[:, k] * scale + shift
    return images


def _windows(rows: Tensor, length: int) -> Tensor:
    """(M, ...) -> (M, N, ...): the newest observation last; the first one fills the window."""
    steps = torch.arange(len(rows))[:, None] + torch.arange(1 - length, 1)
    return rows[steps.clamp(min=0)]
