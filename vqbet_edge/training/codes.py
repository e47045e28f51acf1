"""How well the learned codes stand for the demonstrated action chunks."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqbet_edge.training.network import VqVae


@dataclass(frozen=True)
class CodeReport:
    """Figures over a set of chunks.

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

    def metrics(self) -> dict[str, float]:
        """Flat, for metrics.jsonl."""
        return {
            "reconstruction_l1": self.error,
            **{
                f"reconstruction_l1_action_{i}": float(e) for i, e in enumerate(self.error_in_units)
            },
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
    size = vqvae.vq_layer.codebooks[0].embed.shape[1]
    counts = [torch.bincount(codes[:, layer], minlength=size).double() for layer in range(2)]
    primary, secondary = (count / count.sum() for count in counts)
    return CodeReport(
        error=float(error.mean()),
        error_in_units=error.mean((0, 1)).cpu().numpy() * unit,
        used=(int((primary > 0).sum()), int((secondary > 0).sum())),
        perplexity=(_perplexity(primary), _perplexity(secondary)),
        pairs=len(torch.unique(codes, dim=0)),
    )


def _perplexity(shares: Tensor) -> float:
    return float(torch.special.entr(shares).sum().exp())
