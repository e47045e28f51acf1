"""What the codes are worth while they are learned: figures for a run's metrics."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqbet_edge.training.codes.use import Use
from vqbet_edge.training.network import VqVae


@dataclass(frozen=True)
class CodeReport:
    """How well the codes stand for a set of demonstrated action chunks.

    Attributes:
        error: L1 of the reconstruction, normalised.
        error_in_units: (A,), the same in each action dimension's own unit.
        use: of the codes.
    """

    error: float
    error_in_units: npt.NDArray[np.float32]
    use: Use

    def __str__(self) -> str:
        errors = ", ".join(f"{value:.3g}" for value in self.error_in_units)
        first, second = self.use.layers
        return (
            f"codes: reconstruction error {errors} in the action's units; {first.used} + "
            f"{second.used} codes used, perplexity {first.perplexity:.1f} + "
            f"{second.perplexity:.1f}, {self.use.pairs} code pairs in use"
        )

    def metrics(self) -> dict[str, float]:
        """Flat, for metrics.jsonl."""
        found = {"reconstruction_l1": self.error, "code_pairs_used": self.use.pairs}
        for i, error in enumerate(self.error_in_units.tolist()):
            found[f"reconstruction_l1_action_{i}"] = error
        for name, layer in zip(("primary", "secondary"), self.use.layers, strict=True):
            found |= {f"{name}_codes_used": layer.used, f"{name}_perplexity": layer.perplexity}
        return found


@torch.no_grad()
def report_codes(vqvae: VqVae, chunks: Tensor, unit: npt.NDArray[np.float32]) -> CodeReport:
    """Measure the codes of chunks (M, W, A), normalised; `unit` is the action's, (A,)."""
    codes = vqvae.encode(chunks).codes
    error = (vqvae.decode(codes) - chunks).abs()
    use = Use.of(codes.cpu().numpy(), vqvae.vq_layer.codebooks[0].embed.shape[1])
    return CodeReport(float(error.mean()), error.mean((0, 1)).cpu().numpy() * unit, use)
