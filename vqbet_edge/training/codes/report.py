"""The report on one policy's codes: every figure that what is given can tell.

Letters: T steps of an episode, C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.training.codebooks import DEAD_SHARE
from vqbet_edge.training.codes.modes import Considered, joint, merge
from vqbet_edge.training.codes.policies import CodedFacts, CodedPolicy
from vqbet_edge.training.codes.use import Codes, Floats, LayerUse, Use, entropy, rms_spread
from vqbet_edge.training.config import ACTION_KEY
from vqbet_edge.training.dataset.samples import Place, Source, check_features
from vqbet_edge.training.normalization import chunks_of

# So many pairs are listed; of codebooks larger than 16 x 16, the most used.
MOST_PAIRS = 256
# Pairs drawn less often than this are not worth a picture.
DRAWN = 1e-3
# Chunks that differ by less are the same, in the network's units.
NO_DIFFERENCE = 0.01
# Two chunks are one mode within twice the offsets' size, which can turn one into the other, or
# within this share of the decoded chunks' spread.
_SAME_OFFSETS, _SAME_SPREAD = 2.0, 0.1


@dataclass(frozen=True)
class Pair:
    """One code pair, and the chunk (W, A) that it is decoded to, in the robot's units."""

    primary: int
    secondary: int
    chunk: Floats


@dataclass(frozen=True)
class Demonstrations:
    """All chunks of the data set, one per frame, and what the codes lose of them.

    Attributes:
        chunks: how many.
        spread: (A,), mean absolute deviation from the mean chunk, in the robot's units.
        use: of their codes.
        primary, both: (A,), mean absolute errors by the primary code alone and by both, in the
            robot's units.
        left_by_primary, left_by_both: the same as shares of the demonstrations' spread, over all
            action dimensions in the network's units: 0 loses nothing, 1 is no better than the
            mean chunk. 0 too where there is no spread.
    """

    chunks: int
    spread: Floats
    use: Use
    primary: Floats
    both: Floats
    left_by_primary: float
    left_by_both: float


@dataclass(frozen=True)
class EpisodeTrace:
    """An episode's predictions, one per step.

    Attributes:
        episode: position in its source.
        codes: int64 (T, 2), the most probable ones.
        pair_entropy, mode_entropy: (T,), in nats; see `modes`.
        modes: int64 (T,), live modes.
    """

    episode: int
    codes: Codes
    pair_entropy: Floats
    mode_entropy: Floats
    modes: NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """What the policy predicts at every step of some episodes.

    Attributes:
        steps: how many.
        use: of the most probable codes.
        pair_shares: (C, C), mean probability of every pair.
        fork_share: share of the steps with more than one live mode.
        tolerance: up to which two chunks are one mode, in the network's units.
        decoded: (steps,), mean absolute deviation of a step's decoded chunk from the steps' mean
            decoded chunk, in the network's units: what choosing a code changes.
        offset: (steps,), mean absolute offset, likewise.
        offset_ratio: mean offset by mean decoded: above 1 offsets do more than codes; None where
            every step has the same decoded chunk.
        unseen: pairs drawn in at least `DRAWN` of the predictions that no demonstration has, most
            often first; None without demonstrations.
        unseen_share: of all draws, the rarer pairs included; likewise.
        episodes: the predictions.
    """

    steps: int
    use: Use
    pair_shares: Floats
    fork_share: float
    tolerance: float
    decoded: Floats
    offset: Floats
    offset_ratio: float | None
    unseen: tuple[tuple[int, int], ...] | None
    unseen_share: float | None
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

    policy: CodedFacts
    data: str | None
    chunk_spread: float
    training_use: tuple[LayerUse, LayerUse] | None
    pairs: tuple[Pair, ...]
    demonstrations: Demonstrations | None
    predictions: Predictions | None


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
    found = predicted = training_use = None
    if policy.vqvae is not None:
        counts = [b.cluster_size[0].cpu().numpy() for b in policy.vqvae.vq_layer.codebooks]
        primary, secondary = (LayerUse.of(c, DEAD_SHARE * c.mean()) for c in counts)
        training_use = primary, secondary
    if source is not None:
        check_features(source, policy.manifest.observation_shapes)
        if ACTION_KEY in source.shapes:
            check_features(source, {ACTION_KEY: (policy.facts.action_dim,)})
            found = _demonstrations(policy, source) if policy.vqvae is not None else None
        places = chosen_places(source.lengths, frames, episodes)
        predicted = _predictions(policy, source, places, found, on_episode)
    every = np.argwhere(np.ones((policy.facts.codes,) * 2))
    return CodesReport(
        policy=policy.facts,
        data=None if source is None else source.name,
        chunk_spread=rms_spread(policy.decode(every[:: -(-len(every) // MOST_PAIRS)])),
        training_use=training_use,
        pairs=_pairs(policy, found, predicted),
        demonstrations=found,
        predictions=predicted,
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
    count = int(np.clip(frames / np.mean([lengths[i] for i in pool]), 1, len(pool)))
    places: list[Place] = []
    for number in np.linspace(0, len(pool) - 1, count).round().astype(int).tolist():
        steps = min(lengths[pool[number]], frames)
        if steps:
            places.append(Place(pool[number], 0, steps, len(places)))
        frames -= steps
    return places


def _demonstrations(policy: CodedPolicy, source: Source) -> Demonstrations:
    affine, relative = policy.action.affine, policy.action.relative
    scale, state_key = affine.multiply.astype(np.float64), policy.manifest.state_key
    places = [Place(i, 0, length, i) for i, length in enumerate(source.lengths)]
    episodes = [source.read(place, [ACTION_KEY, state_key]) for place in places]

    def normalized(episode: int) -> Floats:
        """(T, W, A): the chunk from every step on, made when it is needed."""
        actions, states = (episodes[episode][k].astype(np.float64) for k in (ACTION_KEY, state_key))
        base = affine.add + np.where(relative, states[:, : len(relative)], 0)
        chunks = chunks_of(actions, policy.facts.chunk) - base[:, None]
        # A constant action whose range is zero in the checkpoint has one value in the network too.
        scaled = np.divide(chunks, scale, out=np.zeros_like(chunks), where=scale != 0)
        result: Floats = scaled + affine.subtract
        return result

    total = sum(source.lengths)
    mean = sum(normalized(i).sum(axis=0) for i in range(len(places))) / total
    sums, codes = np.zeros((3, policy.facts.action_dim)), []
    for i in range(len(places)):
        chunks = normalized(i)
        made = policy.reconstruct(chunks)
        codes.append(made.codes)
        off = mean - chunks, made.primary - chunks, made.both - chunks
        sums += [np.abs(difference).mean(axis=1).sum(axis=0) for difference in off]
    spread, primary, both = sums / total
    spread[spread < 1e-9] = 0  # the mean of equal numbers differs from them by less
    whole, unit = float(spread.mean()), np.abs(scale)
    return Demonstrations(
        chunks=total,
        spread=spread * unit,
        use=Use.of(np.concatenate(codes), policy.facts.codes),
        primary=primary * unit,
        both=both * unit,
        left_by_primary=float(primary.mean() / whole) if whole else 0.0,
        left_by_both=float(both.mean() / whole) if whole else 0.0,
    )


def _predictions(
    policy: CodedPolicy,
    source: Source,
    places: Sequence[Place],
    demonstrated: Demonstrations | None,
    on_episode: Callable[[int, int], None],
) -> Predictions:
    facts, considered, entropies, decisions = policy.facts, [], [], []
    drawn = np.zeros((facts.codes,) * 2)
    for done, place in enumerate(places, 1):
        made = policy.predict(source, place)
        for one in made:
            pairs = joint(
                int(one.codes[0]), one.code_probabilities, policy.columns, facts.temperature
            )
            drawn += pairs
            considered.append(Considered.of(pairs))
            entropies.append(entropy(pairs))
        decisions += made
        on_episode(done, len(places))
    codes = np.stack([one.codes for one in decisions])
    decoded = np.stack([one.decoded_chunk for one in decisions]).astype(np.float64)
    offset = np.stack([one.offset_chunk for one in decisions]).astype(np.float64)
    # From what a bundle tells as well, so that it and its checkpoint have the same modes.
    bridged = _SAME_OFFSETS * float(np.sqrt((offset**2).mean()))
    tolerance = max(bridged, _SAME_SPREAD * rms_spread(decoded))
    modes = merge(considered, policy.decode, tolerance)
    live, mode_entropies = np.array(modes).T
    ends = np.cumsum([place.stop - place.start for place in places])[:-1]
    parts = (codes, np.array(entropies), mode_entropies, live.astype(np.int64))
    changed = np.abs(decoded - decoded.mean(axis=0)).mean(axis=(1, 2))
    added = np.abs(offset).mean(axis=(1, 2))
    ratio = float(added.mean() / changed.mean()) if changed.mean() > NO_DIFFERENCE else None
    shares = drawn / len(decisions)
    unseen, unseen_share = None, None
    if demonstrated is not None:
        never = np.where(demonstrated.use.pair_counts > 0, 0, shares)
        order = np.argsort(-never, axis=None, kind="stable").tolist()
        unseen = tuple(divmod(i, facts.codes) for i in order if never.flat[i] >= DRAWN)
        unseen_share = float(never.sum())
    return Predictions(
        steps=len(decisions),
        use=Use.of(codes, facts.codes),
        pair_shares=shares,
        fork_share=float((live > 1).mean()),
        tolerance=tolerance,
        decoded=changed,
        offset=added,
        offset_ratio=ratio,
        unseen=unseen,
        unseen_share=unseen_share,
        episodes=tuple(
            EpisodeTrace(place.episode, *traced)
            for place, *traced in zip(places, *(np.split(p, ends) for p in parts), strict=True)
        ),
    )


def _pairs(
    policy: CodedPolicy, found: Demonstrations | None, predictions: Predictions | None
) -> tuple[Pair, ...]:
    """Pairs that are used or drawn, most used first; all where nothing is known."""
    weights = np.zeros((policy.facts.codes,) * 2)
    if found is not None:
        weights += found.use.pair_counts
    if predictions is not None:
        # Below 1, so that it decides among those that are used alike.
        weights += np.where(predictions.pair_shares >= DRAWN, predictions.pair_shares, 0)
    order = np.argsort(-weights, axis=None, kind="stable")
    if weights.any():
        order = order[: np.count_nonzero(weights)]
    chosen = np.stack(np.divmod(order[:MOST_PAIRS], len(weights)), axis=1)
    chunks = policy.action.affine.apply(policy.decode(chosen).astype(np.float32))
    return tuple(
        Pair(int(primary), int(secondary), chunk.astype(np.float64))
        for (primary, secondary), chunk in zip(chosen, chunks, strict=True)
    )
