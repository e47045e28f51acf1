"""The policy as a chain of graphs over held-out observations: what a changed graph does to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_calibration.graphs import Session
from vqbet_calibration.ranges import Feed
from vqbet_calibration.samples import Piece, batches
from vqbet_edge.runtime.bundle import SECONDARY_COLUMNS, Bundle
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.normalization import Affine

Array = NDArray[Any]

_CHAIN: tuple[StageName, ...] = ("vision_encoder", "gpt", "code_heads")


@dataclass(frozen=True)
class Outcome:
    """How far a chain with quantised graphs is from the floating-point one.

    Attributes:
        action_error: mean, of the action's range, with the floating-point codes forced.
        total_variation: mean distance between the code distributions, 0 to 1.
        code_agreement: share of observations in which both most probable codes agree.
        cosine: the smallest between a changed stage's outputs and the floating-point ones, per
            stage that was changed.
    """

    action_error: float
    total_variation: float
    code_agreement: float
    cosine: dict[StageName, float]

    @property
    def damage(self) -> float:
        """One figure to rank by; both parts are shares of the most that could go wrong."""
        return self.action_error + self.total_variation


@dataclass(frozen=True)
class _Run:
    """Outputs of a chain for T observations, B robots each."""

    tokens: list[Array]  # per piece (M, B, K, D)
    features: Array  # (T, B, F)
    logits: Array  # (T, B, 2, C)
    offsets: Array  # (T, B, 2, C, W, A)


class Chain:
    """The floating-point policy over pieces of episodes.

    Args:
        bundle: the policy in float32.
        pieces: of one length; they are grouped for a batch of robots.
    """

    def __init__(self, bundle: Bundle, pieces: Sequence[Piece]) -> None:
        self._manifest = bundle.manifest
        self._columns = bundle.arrays.get(SECONDARY_COLUMNS)
        scaling = Affine.from_arrays(bundle.arrays, "state", bundle.manifest.state_dim)
        crop, groups = bundle.manifest.crop, batches(pieces, 1)
        self._frames = [np.stack([crop.cut(p.frames) for p in g], 1) for g in groups]
        states = [np.stack([_scaled(scaling, p.states) for p in g], 1) for g in groups]
        self._states = [window for s in states for window in self._windows(s)]  # (B, N, S) each
        self._sessions = {name: Session(bundle.graph(name)) for name in _CHAIN}
        self._reference = self._run({})

    def feeds(self, stage: StageName) -> list[Feed]:
        """Inputs of a stage, one entry per run."""
        match stage:
            case "vision_encoder":
                return [{"frames": frames} for piece in self._frames for frames in piece]
            case "gpt":
                return self._gpt_feeds(self._reference.tokens)
            case _:
                return [{"feature": feature} for feature in self._reference.features]

    def outcome(self, changed: Mapping[StageName, bytes]) -> Outcome:
        """Exchange graphs and compare; each stage's cosine is taken on floating-point inputs."""
        sessions = {name: Session(graph) for name, graph in changed.items()}
        run = self._run(sessions)
        cosines: dict[StageName, float] = {}
        for name, session in sessions.items():
            first = name == "vision_encoder" or len(sessions) == 1
            alone = run if first else self._run({name: session})
            cosines[name] = self._cosine(name, alone)
        return replace(self._compare(run), cosine=cosines)

    def _run(self, changed: Mapping[StageName, Session]) -> _Run:
        """Only what differs from the reference is computed."""
        sessions, reference = {**self._sessions, **changed}, getattr(self, "_reference", None)
        if reference is not None and "vision_encoder" not in changed:
            tokens = reference.tokens
        else:
            encode = sessions["vision_encoder"]
            tokens = [
                np.stack([encode.run({"frames": frames})[0] for frames in piece])
                for piece in self._frames
            ]
        if reference is not None and not {"vision_encoder", "gpt"} & changed.keys():
            features = reference.features
        else:
            features = np.stack([sessions["gpt"].run(f)[0] for f in self._gpt_feeds(tokens)])
        heads = [sessions["code_heads"].run({"feature": feature}) for feature in features]
        logits, offsets = (np.stack(values) for values in zip(*heads, strict=True))
        return _Run(tokens, features, logits, offsets)

    def _windows(self, piece: Array) -> list[Array]:
        """(M, B, ...) -> M windows (B, N, ...); the first observation fills the window."""
        length = self._manifest.policy.n_obs_steps
        padded = np.concatenate([np.repeat(piece[:1], length - 1, 0), piece])
        return [padded[i : i + length].swapaxes(0, 1) for i in range(len(piece))]

    def _gpt_feeds(self, tokens: list[Array]) -> list[Feed]:
        windows = [window for piece in tokens for window in self._windows(piece)]
        return [
            {"image_tokens": image_tokens, "states": states}
            for image_tokens, states in zip(windows, self._states, strict=True)
        ]

    def _cosine(self, stage: StageName, run: _Run) -> float:
        reference = self._reference
        match stage:
            case "vision_encoder":
                return min(map(_smallest_cosine, run.tokens, reference.tokens))
            case "gpt":
                return _smallest_cosine(run.features, reference.features)
            case _:
                parts = (run.logits, reference.logits), (run.offsets, reference.offsets)
                return min(_smallest_cosine(got, wanted) for got, wanted in parts)

    def _compare(self, run: _Run) -> Outcome:
        reference = self._reference
        primary = reference.logits[:, :, 0].argmax(-1)  # (T, B)
        wanted, got = (self._conditioned(r.logits, primary) for r in (reference, run))
        codes = wanted.argmax(-1)
        errors = np.abs(_chosen(run.offsets, codes) - _chosen(reference.offsets, codes))
        temperature = self._manifest.policy.bet_softmax_temperature
        distance = np.abs(_softmax(wanted / temperature) - _softmax(got / temperature)).sum(-1) / 2
        return Outcome(
            # Normalised actions span [-1, 1].
            action_error=float(errors.mean()) / 2,
            total_variation=float(distance.mean()),
            code_agreement=float((got.argmax(-1) == codes).all(-1).mean()),
            cosine={},
        )

    def _conditioned(self, logits: Array, primary: Array) -> Array:
        if self._columns is None:
            return logits
        columns = self._columns[primary]  # (T, B, C)
        return np.stack([logits[:, :, 0], logits[:, :, 1] + columns], axis=2)


def _scaled(scaling: Affine, states: NDArray[np.float32]) -> NDArray[np.float32]:
    return scaling.apply(states, np.empty_like(states))


def _smallest_cosine(got: Array, wanted: Array) -> float:
    """Per observation: all axes but the first are one vector."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (got, wanted))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min((a * b).sum(1) / np.maximum(norms, 1e-30)))


def _chosen(offsets: Array, codes: Array) -> Array:
    """Offsets (T, B, 2, C, W, A) of codes (T, B, 2), summed over both layers: (T, B, W, A)."""
    index = codes[..., None, None, None]
    chosen: Array = np.take_along_axis(offsets, index, axis=3)[:, :, :, 0].sum(axis=2)
    return chosen


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    normalized: Array = weights / weights.sum(axis=-1, keepdims=True)
    return normalized
