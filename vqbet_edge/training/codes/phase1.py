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
        used: per layer, codes in use.
        perplexity: per layer, exp of the entropy of the codes' use; at most their number.
        pairs: code pairs in use.
    """

    error: float
    error_in_units: npt.NDArray[np.float32]
    used: tuple[int, int]
    perplexity: tuple[float, float]
    pairs: int

    def __str__(self) -> str:
        errors = ", ".join(f"{value:.3g}" for value in self.error_in_units)
        return (
            f"codes: reconstruction error {errors} in the action's units; "
            f"{self.used[0]} + {self.used[1]} codes used, perplexity {self.perplexity[0]:.1f} + "
            f"{self.perplexity[1]:.1f}, {self.pairs} code pairs in use"
        )

    def metrics(self) -> dict[str, float]:
        """Flat, for metrics.jsonl."""
        errors = enumerate(self.error_in_units.tolist())
        return {
            "reconstruction_l1": self.error,
            **{f"reconstruction_l1_action_{i}": error for i, error in errors},
            "primary_codes_used": self.used[0],
            "secondary_codes_used": self.used[1],
            "primary_perplexity": self.perplexity[0],
            "secondary_perplexity": self.perplexity[1],
            "code_pairs_used": self.pairs,
        }


@torch.no_grad()
def report_codes(vqvae: VqVae, chunks: Tensor, unit: npt.NDArray[np.float32]) -> CodeReport:
    """Measure the codes of chunks (M, W, A), normalised; `unit` is the action's, (A,)."""
    codes = vqvae.encode(chunks).codes
    error = (vqvae.decode(codes) - chunks).abs()
    use = Use.of(codes.cpu().numpy(), vqvae.vq_layer.codebooks[0].embed.shape[1])
    primary, secondary = use.layers
    return CodeReport(
        error=float(error.mean()),
        error_in_units=error.mean((0, 1)).cpu().numpy() * unit,
        used=(primary.used, secondary.used),
        perplexity=(primary.perplexity, secondary.perplexity),
        pairs=use.pairs,
    )
