"""What a policy predicts along episodes, and how often it hesitates.

Letters: M chunks, T steps of an episode, C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Sequence

import numpy as np

from vqbet_edge.training.codes.demonstrated import Demonstrated
from vqbet_edge.training.codes.facts import (
    DRAWN,
    SAME,
    EpisodeTrace,
    Errors,
    Offsets,
    Predictions,
    Unseen,
)
from vqbet_edge.training.codes.modes import Considered, Modes, forks, joint, merge
from vqbet_edge.training.codes.policies import CodedPolicy, Steps
from vqbet_edge.training.codes.use import (
    Codes,
    Confusion,
    Floats,
    Use,
    entropy,
    rms_spread,
    transitions,
)
from vqbet_edge.training.dataset.samples import Place

# Two chunks are one mode within twice the offsets' size, which can turn one into the other, or
# within this share of the decoded chunks' spread.
_SAME_OFFSETS, _SAME_SPREAD = 2.0, 0.1


class Predicted:
    """Predictions, episode by episode."""

    def __init__(self, policy: CodedPolicy, demonstrated: Demonstrated | None) -> None:
        self._policy, self._demonstrated = policy, demonstrated
        self._places: list[Place] = []
        self._steps: list[Steps] = []
        self._considered: list[list[Considered]] = []
        self._entropies: list[Floats] = []
        self._drawn = np.zeros((policy.facts.codes,) * 2)

    def add(self, place: Place, steps: Steps) -> None:
        """Take the predictions of one more episode."""
        considered, entropies = [], []
        for probabilities in joint(steps, self._policy.columns, self._policy.facts.temperature):
            self._drawn += probabilities
            considered.append(Considered.of(probabilities))
            entropies.append((entropy(probabilities.sum(axis=1)), entropy(probabilities)))
        self._places.append(place)
        self._steps.append(steps)
        self._considered.append(considered)
        self._entropies.append(np.array(entropies))

    def figures(self) -> Predictions:
        """All figures."""
        traces, facts = self._traces(), self._policy.facts
        several = np.concatenate([trace.modes for trace in traces]) > 1
        total = len(several)
        return Predictions(
            steps=total,
            use=Use.of(np.concatenate([trace.codes for trace in traces]), facts.codes),
            pair_shares=self._drawn / total,
            pair_entropy=float(np.concatenate([t.pair_entropy for t in traces]).mean()),
            mode_entropy=float(np.concatenate([t.mode_entropy for t in traces]).mean()),
            fork_share=float(several.mean()),
            tolerance=self._tolerance,
            transitions=transitions([t.codes for t in traces], facts.chunk, facts.codes),
            offsets=self._offsets(),
            confusion=self._confusion(traces),
            unseen=self._unseen(total),
            errors=self._errors(),
            episodes=tuple(traces),
        )

    @property
    def _tolerance(self) -> float:
        """From what a bundle tells as well, so that it and its checkpoint have the same modes."""
        offsets = np.concatenate([steps.offset for steps in self._steps])
        decoded = np.concatenate([steps.decoded for steps in self._steps])
        bridged = _SAME_OFFSETS * float(np.sqrt((offsets**2).mean()))
        return max(bridged, _SAME_SPREAD * rms_spread(decoded))

    def _traces(self) -> list[EpisodeTrace]:
        flat = [step for steps in self._considered for step in steps]
        modes = iter(merge(flat, self._policy.decode, self._tolerance))
        return [
            self._trace(i, [next(modes) for _ in steps.codes])
            for i, steps in enumerate(self._steps)
        ]

    def _trace(self, number: int, modes: Sequence[Modes]) -> EpisodeTrace:
        live = [mode.live for mode in modes]
        primary, pair = self._entropies[number].T
        return EpisodeTrace(
            episode=self._places[number].episode,
            codes=self._steps[number].codes,
            true_codes=self._true_codes(self._places[number]),
            primary_entropy=primary,
            pair_entropy=pair,
            mode_entropy=np.array([mode.entropy for mode in modes]),
            modes=tuple(live),
            forks=tuple(forks(live)),
        )

    def _true_codes(self, place: Place) -> Codes | None:
        if self._demonstrated is None or self._demonstrated.codes is None:
            return None
        return self._demonstrated.codes[place.episode][place.start : place.stop]

    def _offsets(self) -> Offsets:
        decoded = np.concatenate([steps.decoded for steps in self._steps])
        offset = np.abs(np.concatenate([steps.offset for steps in self._steps]))
        changed = np.abs(decoded - decoded.mean(axis=0)).mean(axis=(1, 2))
        whole = float(changed.mean())
        return Offsets(
            decoded=changed,
            offset=offset.mean(axis=(1, 2)),
            ratio=float(offset.mean() / whole) if whole > SAME else None,
            in_units=offset.mean(axis=(0, 1)) * np.abs(self._policy.action.affine.multiply),
        )

    def _confusion(self, traces: Sequence[EpisodeTrace]) -> tuple[Confusion, Confusion] | None:
        true = [trace.true_codes for trace in traces if trace.true_codes is not None]
        if not true:
            return None
        codes, size = np.concatenate([trace.codes for trace in traces]), self._policy.facts.codes
        primary, secondary = zip(np.concatenate(true).T, codes.T, strict=True)
        return Confusion.of(*primary, size), Confusion.of(*secondary, size)

    def _unseen(self, total: int) -> Unseen | None:
        if self._demonstrated is None or self._demonstrated.figures.use is None:
            return None
        seen = self._demonstrated.figures.use.pair_counts > 0
        shares = np.where(seen, 0, self._drawn / total)
        order = np.argsort(-shares, axis=None, kind="stable")
        most = [divmod(int(i), len(seen)) for i in order if shares.flat[i] >= DRAWN]
        return Unseen(tuple(most), float(shares.sum()))

    def _errors(self) -> Errors | None:
        if self._demonstrated is None:
            return None
        unit, sums, count = np.abs(self._policy.action.affine.multiply), np.zeros(()), 0
        for place, steps in zip(self._places, self._steps, strict=True):
            chunks = self._demonstrated.chunks(place.episode)[place.start : place.stop]
            both = np.stack([steps.decoded, steps.decoded + steps.offset])
            sums = sums + np.abs(both - chunks).mean(axis=2).sum(axis=1)
            count += len(chunks)
        decoded, with_offset = sums / count * unit
        return Errors(decoded, with_offset)
