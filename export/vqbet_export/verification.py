"""Proof that a bundle computes the policy that it was exported from.

Every stage runs by itself on the reference's inputs; the whole bundle runs through `EdgePolicy`
with the reference's codes forced, so that normalisation, window, table and fusion are proven too.
Observations are drawn, compared and dropped one piece at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.base import Backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import unpack_frames
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.comparison import (
    Limits,
    PolicyResult,
    StageComparison,
    StageResult,
    worst,
)
from vqbet_edge.runtime.manifest import StageName, Target, VerificationSpec
from vqbet_edge.runtime.observation import Observation
from vqbet_edge.runtime.proof import PolicyCheck, act_out
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.dataset.samples import Piece
from vqbet_export.onnx_graphs import StageSession, TensorRTGraphs
from vqbet_export.reference import Reference, run_reference
from vqbet_export.stages import decode_table

# All pairs of a codebook of 64; of larger ones, as many pairs spread evenly.
MAX_DECODED_PAIRS = 4096


@dataclass(frozen=True)
class Verification:
    """Results on one set of observations.

    Attributes:
        observations: "random" or what else they are.
        samples: how many.
        target: whose graphs ran where the bundle has two kinds, "tensorrt" or "cpu".
    """

    observations: str
    samples: int
    stages: dict[StageName, StageResult]
    policy: PolicyResult
    target: Target | None = None

    def violations(self, limits: Limits) -> list[str]:
        """What breaks the limits, one line each."""
        found = self.policy.violations(limits)
        for name, stage in self.stages.items():
            found += stage.violations(name, limits)
        graphs = "" if self.target is None else f", graphs for {self.target}"
        return [f"{line} ({self.observations} observations{graphs})" for line in found]


def summarize(results: Sequence[Verification]) -> VerificationSpec:
    """What the manifest says: of the last observations, the worst of each measure."""
    same = [result for result in results if result.observations == results[-1].observations]
    return VerificationSpec(
        observations="random" if same[0].observations == "random" else "dataset",
        samples=same[0].samples,
        max_action_error=max(result.policy.action_error for result in same),
        code_agreement=min(result.policy.code_agreement for result in same),
        min_cosine=min(stage.cosine for result in same for stage in result.stages.values()),
    )


class Verifier:
    """A bundle beside its checkpoint.

    Args:
        bundle: need not have a verification summary yet.
        checkpoint: what it was exported from.
        targets: whose graphs to run, stage by stage and end to end; None takes TensorRT's for the
            first and the CPU's for the second.
    """

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, targets: Sequence[Target | None] = (None,)
    ) -> None:
        self._bundle, self._checkpoint = bundle, checkpoint
        self._graphs = [_Graphs.load(bundle, target) for target in targets]

    def verify(
        self,
        pieces: Iterable[Piece],
        name: str,
        seen: Callable[[Piece, Reference], None] = lambda *_: None,
    ) -> list[Verification]:
        """Compare on some observations, of which one piece is in memory at a time.

        Args:
            pieces: the observations.
            name: what to call them in the report.
            seen: is handed every piece with what the reference computed.

        Returns:
            One result per target.
        """
        checks = [_Check(self._bundle, self._checkpoint, graphs) for graphs in self._graphs]
        for piece in pieces:
            reference = run_reference(self._checkpoint, piece)
            seen(piece, reference)
            for check in checks:
                check.add(piece, reference)
            del piece  # before the next one is made
        return [check.result(name) for check in checks]

    def proves(self, cases: ReferenceCases) -> bool:
        """Whether all graphs keep the limits on reference cases."""
        proofs = [act_out(self._bundle, graphs.backend, cases) for graphs in self._graphs]
        return not any(proof.violations for proof in proofs)


@dataclass(frozen=True)
class _Graphs:
    """One target's graphs, end to end and stage by stage."""

    target: Target | None
    backend: Backend
    gpt: StageSession
    heads: StageSession
    decoder: StageSession

    @classmethod
    def load(cls, bundle: Bundle, target: Target | None) -> "_Graphs":
        on_tensorrt = target == "tensorrt"
        return cls(
            target,
            TensorRTGraphs(bundle) if on_tensorrt else create_backend("onnxruntime", bundle),
            StageSession(bundle, "gpt", target),
            StageSession(bundle, "code_heads", target),
            StageSession(bundle, "rvq_decoder", target),
        )


class _Check:
    """One target's graphs beside the reference."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, graphs: _Graphs) -> None:
        self._bundle, self._checkpoint, self._graphs = bundle, checkpoint, graphs
        self._policy, self._prefetch = PolicyCheck(bundle, graphs.backend), False
        self._feature = StageComparison()
        self._logits, self._offsets = StageComparison(), StageComparison()

    def add(self, piece: Piece, reference: Reference) -> None:
        """Run everything on a piece."""
        expected = reference.outputs
        # Both ways to the same actions, on half of the pieces each.
        self._prefetch = not self._prefetch
        observations = _observations(self._checkpoint, piece)
        self._policy.add(observations, expected, prefetch=self._prefetch)
        self._feature.add(
            self._graphs.gpt.run(reference.image_tokens, reference.states)[0], expected.feature
        )
        logits, offsets = self._graphs.heads.run(expected.feature)
        rows = 1 + expected.codes[:, 0] if self._bundle.manifest.secondary_rows > 1 else 1
        given = logits[np.arange(len(logits)), rows]
        self._logits.add(np.stack([logits[:, 0], given], axis=1), expected.logits)
        self._offsets.add(offsets, reference.offsets)

    def result(self, name: str) -> Verification:
        """The figures of all pieces."""
        return Verification(
            observations=name,
            samples=self._policy.steps,
            stages={
                # Its inputs are the observations themselves, so the whole policy ran it already.
                "vision_encoder": self._policy.stages["vision_encoder"],
                "gpt": self._feature.result,
                "code_heads": worst([self._logits.result, self._offsets.result]),
                "rvq_decoder": _verify_decoder(self._graphs.decoder, self._checkpoint),
            },
            policy=self._policy.policy,
            target=self._graphs.target,
        )


def _verify_decoder(decoder: StageSession, checkpoint: Checkpoint) -> StageResult:
    size = checkpoint.config.vqvae_n_embed
    pairs = np.linspace(0, size**2 - 1, min(size**2, MAX_DECODED_PAIRS)).astype(np.int64)
    codes = np.stack(np.divmod(pairs, size), axis=1)
    comparison = StageComparison()
    decoded = decoder.run(codes)[0]
    comparison.add(decoded, decode_table(checkpoint).numpy()[codes[:, 0], codes[:, 1]])
    return comparison.result


def _observations(checkpoint: Checkpoint, piece: Piece) -> Iterator[Observation]:
    """What a robot would pass, one step after the other."""
    shapes, state_key = checkpoint.image_shapes, checkpoint.state_key
    for frames, state in zip(piece.frames, piece.states, strict=True):
        yield {**unpack_frames(frames, shapes), state_key: state}
