"""The policy as a chain of graphs over observations: what a changed graph does to it.

Letters: T observations, N window, K cameras, D `gpt_hidden_dim`, S state width, F `gpt_output_dim`,
C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from vqbet_calibration.graphs import Array, Feed, GraphSession, parts
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.comparison import cosines
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.normalization import Affine, Floats
from vqbet_edge.runtime.sampling import softmax
from vqbet_edge.runtime.window import sliding_windows
from vqbet_edge.training.dataset.samples import Piece

# Distributions are compared at no less than this share of the logits' spread.
_BLUNTEST = 0.01


@dataclass(frozen=True)
class Outcome:
    """How far a chain with quantised graphs is from the floating-point one.

    Attributes:
        action_error: mean, of the action's range, with the floating-point codes forced.
        total_variation: mean distance between the code distributions, 0 to 1.
        code_agreement: share of observations in which both most probable codes agree.
        cosine: the smallest between a changed stage's outputs and the floating-point ones, per
            stage that was changed as a whole.
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
class _Outputs:
    features: Floats  # (T, F)
    logits: Floats  # (T, 1 + R, C)
    offsets: Floats  # (T, 2, C, W, A)


Inputs = Sequence[Sequence[Array]]


def encoder_feeds(bundle: Bundle, pieces: Iterable[Piece]) -> Iterator[Feed]:
    """Inputs of the encoder, one observation at a time."""
    for piece in pieces:
        yield from ({"frames": frames} for (frames,) in _encoder_inputs(bundle, piece))


def gpt_feeds(bundle: Bundle, pieces: Iterable[Piece]) -> Iterator[Feed]:
    """Inputs of the transformer, one observation at a time; a piece in memory."""
    encoder = GraphSession(bundle.graph("vision_encoder"))
    length = bundle.manifest.policy.n_obs_steps
    for piece in pieces:
        tokens = encoder.run_first(_encoder_inputs(bundle, piece))
        windows = (sliding_windows(x, length) for x in (tokens, _scaled_states(bundle, piece)))
        for image_tokens, states in zip(*windows, strict=True):
            vectors = {"states": states[None]} if states.size else {}
            yield {"image_tokens": image_tokens[None], **vectors}


def _encoder_inputs(bundle: Bundle, piece: Piece) -> list[list[Array]]:
    return [[frames[None]] for frames in bundle.manifest.crop.cut(piece.frames)]


def _scaled_states(bundle: Bundle, piece: Piece) -> Floats:
    scaling = Affine.from_arrays(bundle.arrays, "state", bundle.manifest.state_dim)
    return scaling.apply(piece.states, np.empty_like(piece.states))


class Chain:
    """The floating-point policy over pieces of episodes.

    Args:
        bundle: the policy in float32.
        pieces: what it observes; cropped frames are kept.
        stride: the transformer sees every observation of so many.
    """

    def __init__(self, bundle: Bundle, pieces: Iterable[Piece], stride: int = 1) -> None:
        self._bundle, self._stride = bundle, stride
        self._frames: list[list[Array]] = []
        self._lengths: list[int] = []
        states: list[Floats] = []
        for piece in pieces:
            self._frames += _encoder_inputs(bundle, piece)
            self._lengths.append(len(piece.states))
            states.append(_scaled_states(bundle, piece))
        self._states = self._windows(np.concatenate(states))
        self._heads = GraphSession(bundle.graph("code_heads"))
        self._gpt = GraphSession(bundle.graph("gpt"))
        self._outputs: WeakKeyDictionary[GraphSession, Floats] = WeakKeyDictionary()
        tokens = GraphSession(bundle.graph("vision_encoder")).run_first(self._frames)
        self._tokens = tokens
        self._reference = self._behind_gpt(self._gpt.run_first(self._gpt_inputs(tokens)))

    def inputs(self, stage: StageName) -> Inputs:
        """Floating-point inputs of the encoder or the transformer, per observation."""
        return self._frames if stage == "vision_encoder" else self._gpt_inputs(self._tokens)

    def outcome(self, changed: Mapping[StageName, GraphSession]) -> Outcome:
        """Exchange graphs and compare; each stage's cosine is taken on floating-point inputs."""
        cosine: dict[StageName, float] = {}
        run = self._reference
        if "gpt" in changed:
            run = self._behind_gpt(self._alone("gpt", changed["gpt"]))
            cosine["gpt"] = float(cosines(run.features, self._reference.features).min())
        if "vision_encoder" in changed:
            tokens = self._alone("vision_encoder", changed["vision_encoder"])
            cosine["vision_encoder"] = float(cosines(tokens, self._tokens).min())
            gpt = changed.get("gpt", self._gpt)
            run = self._behind_gpt(gpt.run_first(self._gpt_inputs(tokens)))
        return self._compare(run, cosine)

    def parts(self, stage: StageName) -> Iterator["StagePart"]:
        """The parts of a stage, from the input on, with what enters them.

        Only one part's inputs are in memory.
        """
        graphs = parts(self._bundle.graph(stage))
        sessions = [GraphSession(graph) for graph in graphs]
        inputs = self.inputs(stage)
        for i, (graph, session) in enumerate(zip(graphs, sessions, strict=True)):
            yield StagePart(self, stage, graph, inputs, sessions[i + 1 :])
            inputs = session.run_all(inputs)

    def behind(self, stage: StageName, outputs: Floats) -> Outcome:
        """What other outputs (T, ...) of a stage do to the policy."""
        if stage == "vision_encoder":
            outputs = self._gpt.run_first(self._gpt_inputs(outputs))
        return self._compare(self._behind_gpt(outputs), {})

    def _alone(self, stage: StageName, session: GraphSession) -> Floats:
        """Outputs of a stage on floating-point inputs; once per session."""
        if session not in self._outputs:
            self._outputs[session] = session.run_first(self.inputs(stage))
        return self._outputs[session]

    def _behind_gpt(self, features: Floats) -> _Outputs:
        heads = self._heads.run_all([feature[None]] for feature in features)
        logits, offsets = (np.concatenate(values) for values in zip(*heads, strict=True))
        return _Outputs(features, logits, offsets)

    def _gpt_inputs(self, tokens: Floats) -> Inputs:
        rows = zip(self._windows(tokens), self._states, strict=True)
        # A policy that observes cameras alone has states of no width, and its graph none.
        return [[x[None] for x in row if x.size] for row in rows]

    def _windows(self, rows: NDArray[np.float32]) -> Floats:
        """(T, ...) -> (T', N, ...): the windows of the observations that the transformer sees."""
        length = self._bundle.manifest.policy.n_obs_steps
        pieces = np.split(rows, np.cumsum(self._lengths)[:-1])
        return np.concatenate([sliding_windows(p, length)[:: self._stride] for p in pieces])

    def _compare(self, run: _Outputs, cosine: dict[StageName, float]) -> Outcome:
        reference = self._reference
        primary = reference.logits[:, 0].argmax(-1)  # (T,)
        wanted, got = (_conditioned(r.logits, primary) for r in (reference, run))
        codes = wanted.argmax(-1)
        errors = np.abs(_chosen(run.offsets, codes) - _chosen(reference.offsets, codes))
        # Of a nearly greedy policy the distribution shows near ties and nothing else.
        own = self._bundle.manifest.policy.bet_softmax_temperature
        temperature = max(own, _BLUNTEST * float(wanted.std(axis=-1).mean()))
        distance = np.abs(softmax(wanted, temperature) - softmax(got, temperature)).sum(-1) / 2
        return Outcome(
            # Normalised actions span [-1, 1].
            action_error=float(errors.mean()) / 2,
            total_variation=float(distance.mean()),
            code_agreement=float((got.argmax(-1) == codes).all(-1).mean()),
            cosine=cosine,
        )


@dataclass(frozen=True)
class StagePart:
    """A part of a stage within its chain.

    Attributes:
        chain, stage: what it is a part of.
        graph: float32 ONNX.
        inputs: per observation.
        rest: the parts behind it.
    """

    chain: Chain
    stage: StageName
    graph: bytes
    inputs: Inputs
    rest: Sequence[GraphSession]

    def outcome(self, changed: GraphSession) -> Outcome:
        """Exchange this part alone, and compare."""
        values: Inputs = self.inputs
        *inner, last = changed, *self.rest
        for session in inner:
            values = session.run_all(values)
        return self.chain.behind(self.stage, last.run_first(values))


def _chosen(offsets: Floats, codes: NDArray[np.int64]) -> Floats:
    """Offsets (T, 2, C, W, A) of codes (T, 2), summed over both layers: (T, W, A)."""
    index = codes[..., None, None, None]
    chosen: Floats = np.take_along_axis(offsets, index, axis=2)[:, :, 0].sum(axis=1)
    return chosen


def _conditioned(logits: Floats, primary: NDArray[np.int64]) -> Floats:
    """The primary logits and the secondary ones given the primary codes (T,): (T, 2, C)."""
    row = 1 + primary if logits.shape[1] > 2 else np.ones_like(primary)
    return np.stack([logits[:, 0], logits[np.arange(len(logits)), row]], axis=1)
