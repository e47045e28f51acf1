"""Demonstrated chunks, their codes, and what the codes lose of them.

Letters: M chunks, T steps of an episode, C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.codes.facts import Demonstrations, Reconstruction
from vqbet_edge.training.codes.policies import CodedPolicy
from vqbet_edge.training.codes.use import Codes, Floats, Motion, Use, transitions
from vqbet_edge.training.config import ACTION_KEY
from vqbet_edge.training.dataset.samples import Place, Source, check_features
from vqbet_edge.training.normalization import chunks_of

# A mean of equal numbers differs from them by about so much.
_ROUNDING = 1e-9


class Episode(NamedTuple):
    """One demonstration, normalised."""

    actions: Floats  # (T, A)
    bases: Floats  # (T, A), what is subtracted from the chunk of a step: zero unless relative

    def chunks(self, width: int) -> Floats:
        """(T, W, A): the chunk from every step on."""
        return chunks_of(self.actions, width) - self.bases[:, None]


def normalize_actions(actions: NDArray[np.number], action: Affine) -> Floats:
    """(T, A) in the robot's units -> in the network's; `action` goes the other way."""
    result: Floats = _scaled_down(actions - action.add, action) + action.subtract
    return result


def _scaled_down(differences: NDArray[np.number], action: Affine) -> Floats:
    scale = action.multiply.astype(np.float64)
    # A constant action whose range is zero in the checkpoint has one value in the network too.
    zeros = np.zeros(differences.shape)
    result: Floats = np.divide(differences, scale, out=zeros, where=scale != 0)
    return result


def read_episodes(policy: CodedPolicy, source: Source) -> list[Episode] | None:
    """All demonstrations, if the source has actions."""
    if ACTION_KEY not in source.shapes:
        return None
    check_features(source, {ACTION_KEY: (policy.facts.action_dim,)})
    places = [Place(i, 0, length, i) for i, length in enumerate(source.lengths)]
    return [
        _episode(policy, source.read(place, [ACTION_KEY, policy.state_key])) for place in places
    ]


def _episode(policy: CodedPolicy, columns: Mapping[str, NDArray[Any]]) -> Episode:
    affine, relative = policy.action.affine, policy.action.relative
    states = np.where(relative, columns[policy.state_key][:, : len(relative)], 0)
    actions = normalize_actions(columns[ACTION_KEY], affine)
    return Episode(actions, _scaled_down(states, affine))


class Demonstrated:
    """Demonstrated chunks and their codes, episode by episode."""

    def __init__(self, policy: CodedPolicy, episodes: Sequence[Episode]) -> None:
        self._policy, self._episodes = policy, episodes
        self.codes: list[Codes] | None = None
        self.figures = self._figures()

    def chunks(self, episode: int) -> Floats:
        """(T, W, A), normalised."""
        return self._episodes[episode].chunks(self._policy.facts.chunk)

    def _figures(self) -> Demonstrations:
        episodes = range(len(self._episodes))
        unit = np.abs(self._policy.action.affine.multiply).astype(np.float64)
        mean = _mean(self.chunks(i) for i in episodes)
        spread = _mean(np.abs(self.chunks(i) - mean) for i in episodes).mean(axis=0)
        spread[spread < _ROUNDING] = 0
        motions = [Motion.of(self.chunks(i)) for i in episodes]
        jerks = [m.jerk for m in motions if m.jerk is not None]
        reversals = [m.reversals for m in motions if m.reversals is not None]
        use, lost = self._codes(unit, spread)
        facts = self._policy.facts
        return Demonstrations(
            chunks=sum(len(episode.actions) for episode in self._episodes),
            spread=spread * unit,
            jerk=float(np.concatenate(jerks).mean()) if jerks else None,
            reversals=float(np.concatenate(reversals).mean()) if reversals else None,
            use=use,
            reconstruction=lost,
            transitions=None
            if self.codes is None
            else transitions(self.codes, facts.chunk, facts.codes),
        )

    def _codes(self, unit: Floats, spread: Floats) -> tuple[Use | None, Reconstruction | None]:
        """Encode every episode, and see what is lost."""
        codes, errors = [], []
        for episode in range(len(self._episodes)):
            chunks = self.chunks(episode)
            made = self._policy.reconstruct(chunks)
            if made is None:
                return None, None
            lost = [np.abs(decoded - chunks) for decoded in (made.primary, made.both)]
            errors.append(np.stack(lost, axis=1).mean(axis=2))  # (T, 2, A)
            codes.append(made.codes)
        self.codes = codes
        primary, both = np.concatenate(errors).mean(axis=0)
        whole = float(spread.mean())
        found = Reconstruction(
            primary=primary * unit,
            both=both * unit,
            left_by_primary=float(primary.mean() / whole) if whole else 0.0,
            left_by_both=float(both.mean() / whole) if whole else 0.0,
        )
        return Use.of(np.concatenate(codes), self._policy.facts.codes), found


def _mean(parts: Iterable[Floats]) -> Floats:
    """Mean over the first axis of all parts (T, ...), one of them in memory at a time."""
    total, count = np.zeros(()), 0
    for part in parts:
        total, count = total + part.sum(axis=0), count + len(part)
    return total / count
