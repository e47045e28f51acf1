"""The policy without any of the exporter's savings: what a plain export of it contains."""

import sys

import torch
from torch import Tensor, nn

from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.config import STATE_KEY

# The exporter's: the newest that all the runtimes here take.
OPSET = 20


class _Scale(nn.Module):
    """A checkpoint's affine scaling as a module; `shape` is that of its terms."""

    def __init__(self, scaling: Affine, *shape: int) -> None:
        super().__init__()
        for name in ("subtract", "multiply", "add"):
            term = torch.from_numpy(getattr(scaling, name).copy()).view(shape)
            self.register_buffer(name, term)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.subtract) * self.multiply + self.add  # type: ignore[operator]


class WholePolicy(nn.Module):
    """A window of observations -> the chunk of every action query, codes by arg-max.

    Letters: N window, K cameras, H and W image height and width, S state width, Q action queries
    (index N - 1 is the current step), C codes per layer, T actions per chunk, A action width.
    """

    relative: Tensor | None

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.network = checkpoint.network
        cameras = [checkpoint.inputs[key] for key in checkpoint.config.image_keys]
        self.scale_images = nn.ModuleList(_Scale(terms, -1, 1, 1) for terms in cameras)
        self.scale_states = _Scale(checkpoint.inputs[STATE_KEY], -1)
        self.scale_actions = _Scale(checkpoint.action, -1)
        scaling = checkpoint.action_scaling
        relative = None if scaling.base is None else torch.from_numpy(scaling.relative).float()
        self.register_buffer("relative", relative)

    def forward(self, images: Tensor, states: Tensor) -> Tensor:
        """(1, N, K, 3, H, W) in [0, 1] and (1, N, S) -> (Q, T, A), in the robot's units."""
        scaled = [scale(images[:, :, k]) for k, scale in enumerate(self.scale_images)]
        features = self.network(torch.stack(scaled, dim=2), self.scale_states(states))[0]
        head = self.network.head
        primary = head.code_logits(features)[..., 0, :].argmax(dim=-1)
        secondary = head.code_logits(features, primary)[:, 1].argmax(dim=-1)
        codes = torch.stack([primary, secondary], dim=-1)
        chunks: Tensor = self.scale_actions(head.action_chunk(features, codes))
        if self.relative is not None:
            chunks = chunks + self.relative * states[0, -1, : len(self.relative)]
        return chunks


def export_single_graph(checkpoint: str, output: str) -> None:
    """Write the whole policy as one ONNX graph, with PyTorch's exporter as it comes."""
    loaded = load_checkpoint(checkpoint)
    config = loaded.config
    frames = len(config.image_keys), 3, *config.frame_size
    images = torch.zeros(1, config.n_obs_steps, *frames)
    states = torch.zeros(1, config.n_obs_steps, config.state_dim)
    torch.onnx.export(
        WholePolicy(loaded).eval(),
        (images, states),
        output,
        input_names=["images", "states"],
        output_names=["chunks"],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def main() -> None:
    """Arguments: checkpoint, output."""
    export_single_graph(*sys.argv[1:])
