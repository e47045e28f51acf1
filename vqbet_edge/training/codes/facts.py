"""All that is found about a policy's codes, and its JSON.

Letters: M chunks, T steps of an episode, C codes per layer, W actions per chunk, A action width.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from vqbet_edge.training.codes.modes import Fork
from vqbet_edge.training.codes.policies import PolicyFacts
from vqbet_edge.training.codes.use import Codes, Confusion, Floats, LayerUse, Use

# Pairs drawn less often than this are not worth a picture.
DRAWN = 1e-3
# Chunks that differ by less are the same, in the network's units.
SAME = 0.01


@dataclass(frozen=True)
class Pair:
    """One code pair.

    Attributes:
        primary, secondary: the codes.
        count: demonstrated chunks that it encodes; None where that is not known.
        drawn: how often it is drawn at the policy's temperature, as a share of the predictions;
            None without predictions.
        chunk: (W, A), decoded, in the robot's units.
        jerk, reversals: see `Motion`.
    """

    primary: int
    secondary: int
    count: int | None
    drawn: float | None
    chunk: Floats
    jerk: float | None
    reversals: int | None


@dataclass(frozen=True)
class Reconstruction:
    """What the codes lose of demonstrated chunks, mean absolute errors.

    Attributes:
        primary, both: (A,), by the primary code alone and by both, in the robot's units.
        left_by_primary, left_by_both: the same as shares of the demonstrations' spread, over all
            action dimensions in the network's units: 0 loses nothing, 1 is no better than the
            mean chunk. 0 too where there is no spread.
    """

    primary: Floats
    both: Floats
    left_by_primary: float
    left_by_both: float


@dataclass(frozen=True)
class Demonstrations:
    """All chunks of the data set, one per frame.

    Attributes:
        chunks: how many.
        spread: (A,), mean absolute deviation from the mean chunk, in the robot's units.
        jerk, reversals: their means, see `Motion`.
        use: of their codes; None from a bundle, which has no encoder, like what follows.
        transitions: (C, C), primary codes one chunk apart, see `use.transitions`.
    """

    chunks: int
    spread: Floats
    jerk: float | None
    reversals: float | None
    use: Use | None
    reconstruction: Reconstruction | None
    transitions: NDArray[np.int64] | None


@dataclass(frozen=True)
class EpisodeTrace:
    """An episode's predictions, one per step.

    Attributes:
        episode: position in its source.
        codes: int64 (T, 2), the most probable ones.
        true_codes: int64 (T, 2), those of what was demonstrated, where that is known.
        primary_entropy, pair_entropy, mode_entropy: (T,), in nats; see `modes`.
        modes: (T,), live modes.
        forks: where there is more than one.
    """

    episode: int
    codes: Codes
    true_codes: Codes | None
    primary_entropy: Floats
    pair_entropy: Floats
    mode_entropy: Floats
    modes: tuple[int, ...]
    forks: tuple[Fork, ...]


@dataclass(frozen=True)
class Offsets:
    """The decoded chunks beside the offsets that are added to them.

    Attributes:
        decoded: (steps,), mean absolute deviation of a step's decoded chunk from the steps' mean
            decoded chunk, in the network's units: what choosing a code changes.
        offset: (steps,), mean absolute offset, likewise.
        ratio: mean offset by mean decoded: above 1 offsets do more than codes; None where every
            step has the same decoded chunk.
        in_units: (A,), mean absolute offset in the robot's units.
    """

    decoded: Floats
    offset: Floats
    ratio: float | None
    in_units: Floats


@dataclass(frozen=True)
class Unseen:
    """Pairs that are drawn although no demonstration has them.

    Attributes:
        pairs: those drawn in at least `DRAWN` of the predictions, most often first.
        share: of all draws, the rarer pairs included.
    """

    pairs: tuple[tuple[int, int], ...]
    share: float


@dataclass(frozen=True)
class Errors:
    """Mean absolute error of predicted chunks, (A,) each, in the robot's units.

    Attributes:
        decoded: of the most probable codes' chunk.
        with_offset: of the same and its offset, which is what a greedy policy does.
    """

    decoded: Floats
    with_offset: Floats


@dataclass(frozen=True)
class Predictions:
    """What the policy predicts at every step of some episodes.

    Attributes:
        steps: how many.
        use: of the most probable codes.
        pair_shares: (C, C), mean probability of every pair.
        pair_entropy, mode_entropy: means, in nats.
        fork_share: share of the steps with more than one live mode.
        tolerance: up to which two chunks are one mode, in the network's units.
        transitions: (C, C), most probable primary codes one chunk apart.
        confusion: per layer, true against most probable codes.
    """

    steps: int
    use: Use
    pair_shares: Floats
    pair_entropy: float
    mode_entropy: float
    fork_share: float
    tolerance: float
    transitions: NDArray[np.int64]
    offsets: Offsets
    confusion: tuple[Confusion, Confusion] | None
    unseen: Unseen | None
    errors: Errors | None
    episodes: tuple[EpisodeTrace, ...]


@dataclass(frozen=True)
class CodesReport:
    """Everything that is found; what is None is not known from what was given.

    Attributes:
        policy: what was looked at.
        data: name of the data set or recording.
        chunk_spread: root mean square deviation of all pairs' chunks from their mean, in the
            network's units; of a large codebook, of some pairs'.
        training_use: use of both layers by the last batches of phase 1.
        pairs: used or drawn ones, most used first; all of them where use is not known.
    """

    policy: PolicyFacts
    data: str | None
    chunk_spread: float
    training_use: tuple[LayerUse, LayerUse] | None
    pairs: tuple[Pair, ...]
    demonstrations: Demonstrations | None
    predictions: Predictions | None


def to_json(report: object) -> bytes:
    """Figures with six digits; keys are the attributes' names."""
    text = msgspec.json.encode(report, enc_hook=_plain)
    return msgspec.json.format(text, indent=1) + b"\n"


def _plain(value: object) -> object:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value)} in a report")
    if value.dtype.kind != "f":
        return value.tolist()
    rounded = [float(f"{number:.6g}") for number in value.reshape(-1).tolist()]
    return np.array(rounded).reshape(value.shape).tolist()
