"""How codes are used: counts, perplexity, transitions, confusion, and how chunks move.

Letters: M chunks, T steps of an episode, C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

# A change of action smaller than this, in the network's units, is no movement to reverse.
STILL = 0.02


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
        dead = np.flatnonzero(counts <= least)
        perplexity = float(np.exp(entropy(counts)))
        return cls(counts.astype(np.float64), len(counts) - len(dead), _ints(dead), perplexity)


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
        counts = count_pairs(codes[:, 0], codes[:, 1], size)
        return cls(
            layers=(LayerUse.of(counts.sum(axis=1)), LayerUse.of(counts.sum(axis=0))),
            pair_counts=counts,
            pairs=int((counts > 0).sum()),
            pair_perplexity=float(np.exp(entropy(counts))),
        )


def count_pairs(rows: Codes, columns: Codes, size: int) -> NDArray[np.int64]:
    """int64 (size, size): how often row r (M,) comes with column c (M,)."""
    return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)


def entropy(weights: NDArray[np.number]) -> float:
    """Entropy in nats of weights of any shape, which need not sum to 1; 0 of no weight at all."""
    positive = weights[weights > 0].astype(np.float64)
    shares = positive / positive.sum()
    return float(-(shares * np.log(shares)).sum() + 0.0)  # not -0


def transitions(episodes: Sequence[Codes], stride: int, size: int) -> NDArray[np.int64]:
    """int64 (C, C): how often primary code r is followed by c, `stride` steps later.

    Args:
        episodes: per episode int64 (T, 2), a code pair per step.
        stride: steps between two predictions, the chunk's length.
        size: codes per layer.
    """
    pairs = [(codes[:-stride, 0], codes[stride:, 0]) for codes in episodes]
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return count_pairs(before, after, size)


@dataclass(frozen=True)
class Confusion:
    """One layer's true codes against its most probable ones.

    Attributes:
        counts: (C, C), by true and predicted code.
        accuracy: share of steps where they are the same.
        majority: share that the most frequent true code would reach, always predicted.
    """

    counts: NDArray[np.int64]
    accuracy: float
    majority: float

    @classmethod
    def of(cls, true: Codes, predicted: Codes, size: int) -> "Confusion":
        """From codes (M,) of one layer."""
        counts = count_pairs(true, predicted, size)
        steps = max(1, len(true))
        majority = counts.sum(axis=1).max() / steps
        return cls(counts, float(np.trace(counts) / steps), float(majority))


@dataclass(frozen=True)
class Motion:
    """How smoothly chunks move, in the network's units.

    Attributes:
        jerk: (M,), root mean square of the actions' third difference; None below four actions.
        reversals: (M,), changes of direction, summed over action dimensions; None below three.
    """

    jerk: Floats | None
    reversals: NDArray[np.int64] | None

    @classmethod
    def of(cls, chunks: Floats) -> "Motion":
        """From normalised chunks (M, W, A)."""
        jerk = reversals = None
        if chunks.shape[1] > 3:
            jerk = np.sqrt((np.diff(chunks, 3, axis=1) ** 2).mean(axis=(1, 2)))
        if chunks.shape[1] > 2:
            reversals = _reversals(np.diff(chunks, axis=1))
        return cls(jerk, reversals)


def _reversals(steps: Floats) -> NDArray[np.int64]:
    """(M, W - 1, A) -> (M,): sign changes along the second axis, standing still left out."""
    signs = np.where(np.abs(steps) > STILL, np.sign(steps), 0).astype(np.int64)
    last, found = signs[:, 0], np.zeros(len(steps), np.int64)
    for sign in np.moveaxis(signs, 1, 0):
        found += (sign * last < 0).sum(axis=-1)
        last = np.where(sign == 0, last, sign)
    return found


def rms_spread(chunks: Floats) -> float:
    """Root mean square deviation of chunks (M, W, A) from their mean chunk (W, A)."""
    return float(np.sqrt(((chunks - chunks.mean(axis=0)) ** 2).mean()))


def _ints(values: NDArray[np.integer]) -> tuple[int, ...]:
    return tuple(values.tolist())
