"""Where a policy hesitates: distributions over code pairs, and over what the pairs stand for.

Many pairs decode to nearly the same chunk. Their entropy is no hesitation, so pairs whose chunks
differ by less than a tolerance are one *mode*.

Letters: T steps, C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.sampling import softmax
from vqbet_edge.training.codes.policies import Steps
from vqbet_edge.training.codes.use import Codes, Floats, entropy

# A mode is live at this probability; pairs below the other are in none.
LIVE, CONSIDERED = 0.1, 0.01


def joint(
    steps: Steps, columns: NDArray[np.float32] | None, temperature: float
) -> Iterator[Floats]:
    """Per step (C, C): the probability of every code pair.

    Args:
        steps: what the policy says; secondary probabilities are those beside `steps.codes`.
        columns: (C, C), what each primary code adds to the secondary logits; None when codes are
            drawn independently of each other.
        temperature: that the probabilities were made with.
    """
    for codes, primary, secondary in zip(*steps[:3], strict=True):
        if columns is None:
            yield primary[:, None] * secondary
            continue
        with np.errstate(divide="ignore"):  # the logarithm of what is never drawn
            scores = np.log(secondary) + (columns - columns[codes[0]]) / temperature
        yield primary[:, None] * softmax(scores)


class Considered(NamedTuple):
    """The pairs of one step that are not negligible."""

    pairs: Codes  # int64 (n, 2)
    probabilities: Floats  # (n,)

    @classmethod
    def of(cls, probabilities: Floats) -> "Considered":
        """From a step's probabilities (C, C)."""
        pairs = np.argwhere(probabilities >= min(CONSIDERED, probabilities.max()))
        return cls(pairs, probabilities[pairs[:, 0], pairs[:, 1]])


@dataclass(frozen=True)
class Modes:
    """What the considered pairs of one step amount to.

    Attributes:
        live: modes with a probability of at least `LIVE`.
        entropy: of the modes' probabilities, in nats.
    """

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
    unique, places = np.unique(
        np.concatenate([s.pairs for s in steps]), axis=0, return_inverse=True
    )
    chunks = decode(unique)
    ends = np.cumsum([len(step.pairs) for step in steps])[:-1]
    return [
        _modes(chunks[place], step.probabilities, tolerance)
        for step, place in zip(steps, np.split(places.reshape(-1), ends), strict=True)
    ]


def _modes(chunks: Floats, probabilities: Floats, tolerance: float) -> Modes:
    apart = np.sqrt(((chunks[:, None] - chunks[None]) ** 2).mean(axis=(2, 3)))
    groups = _connected(apart <= tolerance)
    masses = np.bincount(groups, probabilities)
    return Modes(int((masses >= LIVE).sum()), entropy(masses))


def _connected(linked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(n, n) symmetric -> (n,): a number per connected group."""
    reach = linked.copy()
    for _ in range(len(linked)):
        further = reach @ reach
        if (further == reach).all():
            break
        reach = further
    found: NDArray[np.int64] = np.unique(reach.argmax(axis=1), return_inverse=True)[1].reshape(-1)
    return found


class Fork(NamedTuple):
    """Consecutive steps at which more than one mode is live.

    Attributes:
        start, stop: the steps.
        modes: the most live modes of them.
    """

    start: int
    stop: int
    modes: int


def forks(live: Sequence[int]) -> list[Fork]:
    """The forks of an episode from its live modes per step."""
    several = np.concatenate([[0], np.array(live) > 1, [0]]).astype(int)
    starts, stops = np.flatnonzero(np.diff(several) > 0), np.flatnonzero(np.diff(several) < 0)
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    return [Fork(start, stop, max(live[start:stop])) for start, stop in spans]
