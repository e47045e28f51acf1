"""The policy in PyTorch, as it was trained: what every export is compared with."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqbet_edge.runtime.cases import PolicyOutputs
from vqbet_edge.runtime.window import sliding_windows
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.dataset.samples import Piece
from vqbet_edge.training.normalization import scale_images

Floats = NDArray[np.float32]

# Of images at a time, so that a camera's resolution does not decide how much memory is needed.
_MAX_VALUES = 1 << 22


class Reference(NamedTuple):
    """What the policy computes for the M observations of a piece.

    Letters: N window, K cameras, D `gpt_hidden_dim`, S state width, C codes per layer, W actions
    per chunk, A action width.
    """

    image_tokens: Floats  # (M, N, K, D): what the GPT sees
    states: Floats  # (M, N, S), normalised: likewise
    offsets: Floats  # (M, 2, C, W, A), normalised: of every code
    outputs: PolicyOutputs


@torch.no_grad()
def run_reference(checkpoint: Checkpoint, piece: Piece) -> Reference:
    """Run the training network over a piece: each frame once, then all windows at once."""
    network, config = checkpoint.network, checkpoint.config
    head, length = network.head, config.n_obs_steps
    encoded = _encode(checkpoint, piece)  # (M, K, gpt_input_dim)
    states = torch.from_numpy(checkpoint.inputs[STATE_KEY].apply(piece.states))
    states = _windows(states, length)
    features = network.features(_windows(encoded, length), states)[:, length - 1]
    primary = head.code_logits(features)[..., 0, :].argmax(dim=-1)
    logits = head.code_logits(features, primary)
    codes = torch.stack([primary, logits[:, 1].argmax(dim=-1)], dim=-1)
    offsets = head.offsets(features)
    rows = torch.arange(len(codes))
    frame_tokens = network.vqbet.policy.transformer["wte"](encoded)
    return Reference(
        image_tokens=_windows(frame_tokens, length).numpy(),
        states=states.numpy(),
        offsets=offsets.numpy(),
        outputs=PolicyOutputs(
            frame_tokens=frame_tokens.numpy(),
            feature=features.numpy(),
            logits=logits.numpy(),
            codes=codes.numpy(),
            decoded_chunk=head.vqvae_model.decode(codes).numpy(),
            offset_chunk=(offsets[rows, 0, codes[:, 0]] + offsets[rows, 1, codes[:, 1]]).numpy(),
        ),
    )


def _encode(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    """(M, K, gpt_input_dim): every frame's token."""
    network, config = checkpoint.network, checkpoint.config
    frames = torch.from_numpy(piece.frames).permute(0, 1, 4, 2, 3)  # (M, K, 3, H, W)
    if config.resize_shape is None:
        # The same pixels as after scaling, and only they are ever float.
        frames = network.vqbet.rgb_encoder.center_crop(frames)
    rows = max(1, _MAX_VALUES // frames[0].numel())
    images = (_images(part, checkpoint)[:, None] for part in torch.split(frames, rows))
    return torch.cat([network.encode_images(part)[:, 0] for part in images])


def _images(frames: Tensor, checkpoint: Checkpoint) -> Tensor:
    """uint8 (M, K, 3, H, W) -> float32, normalised."""
    images = frames / 255
    for k, key in enumerate(checkpoint.config.image_keys):
        images[:, k] = scale_images(images[:, k], checkpoint.inputs[key])
    return images


def _windows(rows: Tensor, length: int) -> Tensor:
    """(M, ...) -> (M, N, ...)."""
    return torch.from_numpy(sliding_windows(rows.numpy(), length).copy())
