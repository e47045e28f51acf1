"""The report on one policy's codes: every figure that what is given can tell."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.training.codebooks import DEAD_SHARE
from vqbet_edge.training.codes.demonstrated import Demonstrated, read_episodes
from vqbet_edge.training.codes.facts import DRAWN, CodesReport, Demonstrations, Pair, Predictions
from vqbet_edge.training.codes.policies import CodedPolicy
from vqbet_edge.training.codes.predicted import Predicted
from vqbet_edge.training.codes.use import Codes, Floats, LayerUse, Motion, rms_spread
from vqbet_edge.training.dataset.samples import Place, Source

# So many pairs are listed; of codebooks larger than 16 x 16, the most used.
MOST_PAIRS = 256


def examine_codes(
    policy: CodedPolicy,
    source: Source | None,
    frames: int,
    episodes: Sequence[int] | None = None,
    on_episode: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> CodesReport:
    """Find all figures.

    Args:
        policy: whose codes.
        source: demonstrations or a recording of this policy's robot; None asks the codebook alone.
        frames: predict at so many steps at most.
        episodes: positions of the episodes to take those from; None takes all.
        on_episode: told after each episode how many of how many are done.

    Raises:
        DatasetError: the source does not fit the policy, or is damaged.
    """
    demonstrated = predicted = None
    if source is not None:
        policy.check(source)
        episodes_seen = read_episodes(policy, source)
        demonstrated = None if episodes_seen is None else Demonstrated(policy, episodes_seen)
        places = chosen_places(source.lengths, frames, episodes)
        predicted = Predicted(policy, demonstrated)
        for done, place in enumerate(places, 1):
            predicted.add(place, policy.predict(source, place))
            on_episode(done, len(places))
    found = None if demonstrated is None else demonstrated.figures
    predictions = None if predicted is None else predicted.figures()
    pairs = _pairs(policy, found, predictions)
    return CodesReport(
        policy=policy.facts,
        data=None if source is None else source.name,
        chunk_spread=_chunk_spread(policy),
        training_use=_training_use(policy),
        pairs=pairs,
        demonstrations=found,
        predictions=predictions,
    )


def chosen_places(
    lengths: Sequence[int], frames: int, episodes: Sequence[int] | None = None
) -> list[Place]:
    """Whole episodes, spread evenly, of about `frames` steps together and never more.

    Args:
        lengths: of the source's episodes.
        frames: most steps; an episode that is longer is cut behind so many.
        episodes: positions to choose from; None is all of them.
    """
    pool = [i for i in (range(len(lengths)) if episodes is None else episodes) if lengths[i]]
    mean = np.mean([lengths[i] for i in pool])
    count = int(np.clip(frames / mean, 1, len(pool)))
    places: list[Place] = []
    left = frames
    for place in np.linspace(0, len(pool) - 1, count).round().astype(int).tolist():
        steps = min(lengths[pool[place]], left)
        if steps:
            places.append(Place(pool[place], 0, steps, len(places)))
        left -= steps
    return places


def _training_use(policy: CodedPolicy) -> tuple[LayerUse, LayerUse] | None:
    if policy.moving_counts is None:
        return None
    primary, secondary = (LayerUse.of(c, DEAD_SHARE * c.mean()) for c in policy.moving_counts)
    return primary, secondary


def _pairs(
    policy: CodedPolicy, found: Demonstrations | None, predictions: Predictions | None
) -> tuple[Pair, ...]:
    counts = None if found is None or found.use is None else found.use.pair_counts
    drawn = None if predictions is None else predictions.pair_shares
    chosen = _listed(policy.facts.codes, counts, drawn)
    chunks = policy.decode(chosen)
    motion = Motion.of(chunks)
    return tuple(
        Pair(
            primary=primary,
            secondary=secondary,
            count=None if counts is None else int(counts[primary, secondary]),
            drawn=None if drawn is None else float(drawn[primary, secondary]),
            chunk=policy.action.affine.apply(chunks[i].astype(np.float32)).astype(np.float64),
            jerk=None if motion.jerk is None else float(motion.jerk[i]),
            reversals=None if motion.reversals is None else int(motion.reversals[i]),
        )
        for i, (primary, secondary) in enumerate(chosen.tolist())
    )


def _listed(size: int, counts: NDArray[np.int64] | None, drawn: Floats | None) -> Codes:
    """int64 (P, 2): pairs that are used or drawn, most used first; all where nothing is known."""
    # By count, then by how often a pair is drawn, which is below 1.
    weights, listed = np.zeros((size, size)), np.zeros((size, size), bool)
    if counts is not None:
        weights, listed = weights + counts, counts > 0
    if drawn is not None:
        weights, listed = weights + drawn, listed | (drawn >= DRAWN)
    if counts is None and drawn is None:
        listed[:] = True
    pairs = np.argwhere(listed)
    return pairs[np.argsort(-weights[listed], kind="stable")][:MOST_PAIRS]


def _chunk_spread(policy: CodedPolicy) -> float:
    """Of all pairs, or of so many as are listed."""
    every = np.argwhere(np.ones((policy.facts.codes,) * 2))
    return rms_spread(policy.decode(every[:: -(-len(every) // MOST_PAIRS)]))
