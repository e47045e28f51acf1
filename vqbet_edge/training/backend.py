"""PyTorch as a backend: `EdgePolicy` drives a checkpoint as it drives a bundle.

Letters: B windows, N observations of one, K cameras, D `gpt_input_dim`, F `gpt_output_dim`, C codes
per layer, R rows of secondary logits, W actions per chunk, A action width.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.backends.base import Backend, Floats, Frames, GptRun, HeadOutputs, Window
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.hub import is_bundle
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.description import without_graphs
from vqbet_edge.training.objectives import PixelScaling


class TorchBackend(Backend):
    """A checkpoint's network on the GPU, or on the CPU where there is none.

    Any number of windows share one run of the whole network.
    """

    name = "torch"
    default_prefetch = "off"
    shared_parts = ("window",)
    most_together = sys.maxsize

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = checkpoint.network.to(self.device)
        self.config = config = checkpoint.config
        self._dtype = next(self.network.parameters()).dtype
        pixels = PixelScaling([checkpoint.inputs[key] for key in config.image_keys])
        self.pixels = pixels.to(self.device, self._dtype)

    def create_window(self) -> "TorchWindow":
        """See `Backend`."""
        return TorchWindow(self)

    @torch.no_grad()
    def run_together(self, part: GptRun, windows: Sequence[Window]) -> None:
        """See `Backend`; frames that no run has seen are encoded in one batch too."""
        del part
        mine = [window for window in windows if isinstance(window, TorchWindow)]
        new = [r for r in dict.fromkeys(r for w in mine for r in w.rows) if r.tokens is None]
        if new:
            frames = torch.from_numpy(np.stack([row.frames for row in new])).to(self.device)
            encoded = self.network.encode_images(self.pixels(frames)[:, None])[:, 0]
            for row, one in zip(new, encoded, strict=True):
                row.tokens = one
        tokens = torch.stack([row.tokens for w in mine for row in w.rows if row.tokens is not None])
        states = torch.from_numpy(np.stack([window.states for window in mine]))
        features = self.network.features(
            tokens.view(*states.shape[:2], *tokens.shape[1:]),  # (B, N, K, D)
            states.to(self.device, self._dtype),
        )
        outputs = self.heads(features[:, self.config.n_obs_steps - 1])
        for window, *found in zip(mine, *(x.float().cpu().numpy() for x in outputs), strict=True):
            window.outputs = HeadOutputs(*found)

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) -> logits (B, 1 + R, C) and offsets (B, 2, C, W, A)."""
        head = self.network.head
        logits = head.code_logits(features)
        if head.secondary_columns is not None:
            logits = torch.cat([logits[:, :1], logits[:, 1:] + head.secondary_columns], dim=1)
        return logits, head.offsets(features)

    @torch.no_grad()
    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """Code pairs (..., 2) -> chunks (..., W, A), normalised."""
        chunks = self.network.head.vqvae_model.decode(torch.from_numpy(codes).to(self.device))
        decoded: Floats = chunks.float().cpu().numpy()
        return decoded


class _Row:
    """One observation's frames (K, H, W, 3), and their tokens (K, D) once they are encoded."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames.copy()
        self.tokens: Tensor | None = None


class TorchWindow(Window):
    """Frames wait until a prediction needs them, so that they are encoded together."""

    def __init__(self, backend: TorchBackend) -> None:
        super().__init__(backend)
        self._torch = backend
        self.rows: list[_Row] = []
        self.states: Floats
        self.outputs: HeadOutputs

    def advance(self) -> None:
        """See `Window`."""
        self.rows = [*self.rows[1:], self.rows[-1]]

    def encode(self, frames: Frames, row: int) -> None:
        """See `Window`."""
        if not self.rows:
            self.rows = [_Row(frames)] * self._torch.config.n_obs_steps
        self.rows[row] = _Row(frames)

    def fill(self) -> None:
        """See `Window`."""
        self.rows = self.rows[-1:] * len(self.rows)

    def predict(self, states: Floats) -> HeadOutputs:
        """See `Window`."""
        self.states = states
        shared = self._torch.run_shared
        if shared is None:
            self.run_alone("window")
        else:
            shared(self, "window")
        return self.outputs

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """See `Window`."""
        return self._torch.decode(codes)

    def run_alone(self, part: GptRun) -> None:
        """See `Window`."""
        self._torch.run_together(part, [self])


def load_backend(source: str, name: BackendName = "auto") -> tuple[Bundle, Backend]:
    """A bundle on a backend, or a checkpoint on PyTorch, by what is there.

    Args:
        source: a directory or a Hub id of either.
        name: who runs a bundle.

    Raises:
        CheckpointError: it is neither, or not whole.
        BundleError: the bundle is not whole.
        BackendError: the backend is missing or refuses the bundle.
    """
    if is_bundle(source):
        bundle = Bundle.open(source)
        return bundle, create_backend(name, bundle)
    checkpoint = load_checkpoint(source)
    return without_graphs(checkpoint), TorchBackend(checkpoint)
