"""The policy in PyTorch, as it was trained: what every export is compared with."""

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.normalization import scale_images
from vqbet_export.observations import Segment

Floats = NDArray[np.float32]


class ReferenceRun(NamedTuple):
    """Everything that the policy computes for the M observations of a segment.

    Letters: B batch, N window, K cameras, S state width, C codes, W actions per chunk, A action
    width. The codes are the most probable ones.
    """

    frame_tokens: Floats  # (M, B, K, gpt_hidden_dim), behind the token embedding
    image_tokens: Floats  # (M, B, N, K, gpt_hidden_dim)
    states: Floats  # (M, B, N, S), normalised
    features: Floats  # (M, B, gpt_output_dim)
    codes: NDArray[np.int64]  # (M, B, 2)
    logits: Floats  # (M, B, 2, C), the secondary ones given the primary code
    offsets: Floats  # (M, B, 2, C, W, A)
    chunks: Floats  # (M, B, W, A), normalised


@torch.no_grad()
def run_reference(checkpoint: Checkpoint, segment: Segment) -> ReferenceRun:
    """Run the training network over a segment, window by window."""
    steps = [_window_step(checkpoint, *window) for window in _windows(checkpoint, segment)]
    return ReferenceRun(*map(np.stack, zip(*steps, strict=True)))


def _windows(checkpoint: Checkpoint, segment: Segment) -> list[tuple[Tensor, Tensor]]:
    """Images (B, N, K, 3, H, W) and states (B, N, S) of every step, normalised."""
    config = checkpoint.config
    scalings = [checkpoint.inputs[key] for key in config.image_keys]
    history: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.n_obs_steps)
    windows = []
    for frames, states in zip(segment.frames, segment.states, strict=True):
        images = torch.from_numpy(frames).permute(0, 1, 4, 2, 3) / 255  # (B, K, 3, H, W)
        scaled = [scale_images(images[:, k], s) for k, s in enumerate(scalings)]
        state = torch.from_numpy(checkpoint.inputs[STATE_KEY].apply(states))
        newest = torch.stack(scaled, dim=1), state
        # The first observation fills the window, as in LeRobot's `populate_queues`.
        history.extend([newest] * (1 if history else config.n_obs_steps))
        windows.append(
            (torch.stack([h[0] for h in history], 1), torch.stack([h[1] for h in history], 1))
        )
    return windows


def _window_step(checkpoint: Checkpoint, images: Tensor, states: Tensor) -> ReferenceRun:
    network, config = checkpoint.network, checkpoint.config
    head = network.head
    embed = network.vqbet.policy.transformer["wte"]
    image_tokens = embed(network.encode_images(images))
    features = network(images, states)[:, config.n_obs_steps - 1]
    primary = head.primary_logits(features).argmax(dim=-1)
    logits = head.code_logits(features, primary)
    codes = torch.stack([primary, logits[:, 1].argmax(dim=-1)], dim=-1)
    return ReferenceRun(
        frame_tokens=image_tokens[:, -1].numpy(),
        image_tokens=image_tokens.numpy(),
        states=states.numpy(),
        features=features.numpy(),
        codes=codes.numpy(),
        logits=logits.numpy(),
        offsets=head.offsets(features).numpy(),
        chunks=head.action_chunk(features, codes).numpy(),
    )
