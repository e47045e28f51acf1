"""Where a policy hesitates: distributions over code pairs, and over what the pairs stand for.

Many pairs decode to nearly the same chunk. Their entropy is no hesitation, so pairs whose chunks
differ by less than a tolerance are one *mode*.

Letters: C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.sampling import softmax
from vqbet_edge.training.codes.use import Codes, Floats, entropy

# A mode is live at this probability; pairs below the other are in none.
LIVE, CONSIDERED = 0.1, 0.01


def joint(
    primary: int, probabilities: Floats, columns: NDArray[np.float32] | None, temperature: float
) -> Floats:
    """(C, C): the probability of every code pair.

    Args:
        primary: the code that the secondary probabilities are given.
        probabilities: (2, C), of both layers.
        columns: (C, C), what each primary code adds to the secondary logits; None when codes are
            drawn independently of each other.
        temperature: that the probabilities were made with.
    """
    first, second = probabilities[:1].T, probabilities[1]
    if columns is not None:
        with np.errstate(divide="ignore"):  # the logarithm of what is never drawn
            scores = np.log(second) + (columns - columns[primary]) / temperature
        second = softmax(scores)
    both: Floats = first * second
    return both


class Considered(NamedTuple):
    """The pairs of one step that are not negligible."""

    pairs: Codes  # int64 (n, 2)
    probabilities: Floats  # (n,)

    @classmethod
    def of(cls, probabilities: Floats) -> "Considered":
        """From a step's probabilities (C, C)."""
        pairs = np.argwhere(probabilities >= min(CONSIDERED, probabilities.max()))
        return cls(pairs, probabilities[pairs[:, 0], pairs[:, 1]])


class Modes(NamedTuple):
    """What the considered pairs of one step amount to: live modes, and all modes' entropy."""

    live: int
    entropy: float


def merge(
    steps: Sequence[Considered], decode: Callable[[Codes], Floats], tolerance: float
) -> list[Modes]:
    """Merge every step's pairs into modes.

    Args:
        steps: the considered pairs.
        decode: int64 (P, 2) -> (P, W, A).
        tolerance: root mean square difference up to which two chunks are the same.
    """
    every = np.concatenate([step.pairs for step in steps])
    unique, places = np.unique(every, axis=0, return_inverse=True)
    chunks = decode(unique)
    ends = np.cumsum([len(step.pairs) for step in steps])[:-1]
    found = []
    for step, place in zip(steps, np.split(places.reshape(-1), ends), strict=True):
        apart = chunks[place, None] - chunks[place][None]
        reach = np.sqrt((apart**2).mean(axis=(2, 3))) <= tolerance
        # Whatever is reached over others is one mode with them.
        for _ in range(len(reach).bit_length()):
            reach = reach @ reach
        masses = np.bincount(reach.argmax(axis=1), step.probabilities)
        found.append(Modes(int((masses >= LIVE).sum()), entropy(masses)))
    return found
