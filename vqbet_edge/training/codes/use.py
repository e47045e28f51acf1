"""How codes are used. Letters: M chunks, C codes per layer, W actions per chunk, A action width."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerUse:
    """How often each code of one layer is used.

    Attributes:
        counts: (C,), how often each code occurs; moving counts where a run's buffers are the
            source.
        used: how many codes occur.
        dead: the codes that do not.
        perplexity: exp of the entropy of the codes' shares, 1 to C.
    """

    counts: Floats
    used: int
    dead: tuple[int, ...]
    perplexity: float

    @classmethod
    def of(cls, counts: NDArray[np.number], least: float = 0) -> "LayerUse":
        """From counts (C,); a code with no more than `least` of them is dead."""
        dead = tuple(np.flatnonzero(counts <= least).tolist())
        perplexity = float(np.exp(entropy(counts)))
        return cls(counts.astype(np.float64), len(counts) - len(dead), dead, perplexity)


@dataclass(frozen=True)
class Use:
    """How often codes of both layers and their pairs are used.

    Attributes:
        layers: primary and secondary.
        pair_counts: (C, C), by primary and secondary code.
        pairs: how many pairs occur.
        pair_perplexity: exp of the pairs' entropy, 1 to C squared.
    """

    layers: tuple[LayerUse, LayerUse]
    pair_counts: NDArray[np.int64]
    pairs: int
    pair_perplexity: float

    @classmethod
    def of(cls, codes: Codes, size: int) -> "Use":
        """From code pairs (M, 2) of codebooks of `size` codes."""
        flat = codes[:, 0] * size + codes[:, 1]
        counts = np.bincount(flat, minlength=size * size).reshape(size, size)
        return cls(
            layers=(LayerUse.of(counts.sum(axis=1)), LayerUse.of(counts.sum(axis=0))),
            pair_counts=counts,
            pairs=int((counts > 0).sum()),
            pair_perplexity=float(np.exp(entropy(counts))),
        )


def entropy(weights: NDArray[np.number]) -> float:
    """Entropy in nats of weights of any shape, which need not sum to 1; 0 of no weight at all."""
    positive = weights[weights > 0].astype(np.float64)
    shares = positive / positive.sum()
    return float(-(shares * np.log(shares)).sum() + 0.0)  # not -0


def rms_spread(chunks: Floats) -> float:
    """Root mean square deviation of chunks (M, W, A) from their mean chunk (W, A)."""
    return float(np.sqrt(((chunks - chunks.mean(axis=0)) ** 2).mean()))
