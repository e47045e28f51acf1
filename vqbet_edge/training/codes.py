"""What the learned codes are worth: figures for a run's metrics, and a picture of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vqbet_edge.training.config import ACTION_KEY
from vqbet_edge.training.files import writing
from vqbet_edge.training.network import VQBeT, VqVae
from vqbet_edge.training.normalization import Scalings


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


@torch.no_grad()
def draw_codebook(network: VQBeT, scalings: Scalings, target: Path) -> None:
    """Every code pair's action chunk: a panel per primary code, a line per secondary one.

    Chunks are drawn as paths of the first two action dimensions, or over time when there is one.
    """
    size = network.config.vqvae_n_embed
    codes = torch.arange(size, device=next(network.parameters()).device)
    pairs = torch.stack(torch.meshgrid(codes, codes, indexing="ij"), dim=-1)  # (C, C, 2)
    chunks = network.head.vqvae_model.decode(pairs).float().cpu().numpy()  # (C, C, W, A)
    back = scalings.backward[ACTION_KEY]
    paths = ((chunks - back.subtract) * back.multiply + back.add)[..., :2]
    rows = int(np.ceil(np.sqrt(size)))
    columns = -(-size // rows)
    figure = Figure(figsize=(2 * columns, 2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for primary, panel in enumerate(panels.flat[:size]):
        panel.set_title(f"primary {primary}", fontsize=8)
        for path in paths[primary]:
            panel.plot(*path.T, ".-", linewidth=0.7, markersize=2)
    figure.suptitle("action chunk of every code pair, in the action's units")
    with writing(target):
        figure.savefig(target, dpi=120)
