"""Proof that a bundle computes the policy that it was exported from.

Every stage runs by itself on the reference's inputs; the whole bundle runs through `EdgePolicy`
with the reference's codes forced, and what it returns is compared in the robot's units, so that
normalisation, window, table and fusion are proven too.
Observations are drawn, compared and dropped one piece at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import unpack_frames
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.comparison import (
    LIMITS,
    PolicyResult,
    StageComparison,
    StageResult,
    centred,
)
from vqbet_edge.runtime.manifest import Precision, StageName, Target, VerificationSpec
from vqbet_edge.runtime.proof import PolicyCheck, Proof, act_out
from vqbet_edge.training.dataset.samples import Piece
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_export.onnx_graphs import StageSession, TensorRTGraphs
from vqbet_export.reference import Reference, code_pairs, run_reference

ObservationKind = Literal["random", "dataset"]
# Whose graph it is that computes what is compared.
_GRAPHS: dict[str, StageName] = {
    "vision_encoder": "vision_encoder",
    "gpt": "gpt",
    "code logits": "code_heads",
    "code_heads": "code_heads",
    "rvq_decoder": "rvq_decoder",
}


@dataclass(frozen=True)
class Verification:
    """Results on one set of observations.

    Attributes:
        observations: what they are.
        kind: noise, or what somebody's cameras saw.
        samples: how many.
        stages: every graph by itself, on the reference's inputs.
        precisions: of the graphs, whose limits hold for each by itself.
        whole: of all together, as they act.
        target: whose graphs ran where the bundle has two kinds, "tensorrt" or "cpu".
    """

    observations: str
    kind: ObservationKind
    samples: int
    stages: dict[str, StageResult]
    precisions: dict[str, Precision]
    whole: Proof
    target: Target | None = None

    @property
    def policy(self) -> PolicyResult:
        """Of the whole policy."""
        return self.whole.policy

    @property
    def violations(self) -> list[str]:
        """What breaks the limits, one line each."""
        found = self.whole.violations
        for name, stage in self.stages.items():
            found += stage.violations(f"{name} alone", LIMITS[self.precisions[name]])
        graphs = "" if self.target is None else f", graphs for {self.target}"
        return [f"{line} ({self.observations} observations{graphs})" for line in found]


def summarize(results: Sequence[Verification], cases: ObservationKind) -> VerificationSpec:
    """What the manifest says: of the last observations, the worst of each measure.

    Args:
        results: of all observations.
        cases: what the reference cases show.
    """
    same = [result for result in results if result.observations == results[-1].observations]
    return VerificationSpec(
        observations=same[0].kind,
        cases=cases,
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
        frame: temperature, spread and prints of the reference.
        targets: whose graphs to run, stage by stage and end to end; None takes TensorRT's for the
            first and the CPU's for the second.
    """

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: AnyCheckpoint,
        frame: ReferenceCases,
        targets: Sequence[Target | None] = (None,),
    ) -> None:
        self._bundle, self._checkpoint = bundle, checkpoint
        self._graphs = [_Graphs(bundle, checkpoint, frame, target) for target in targets]

    def verify(
        self,
        pieces: Iterable[Piece],
        name: str,
        kind: ObservationKind,
        seen: Callable[[Piece, Reference], None] = lambda *_: None,
    ) -> list[Verification]:
        """Compare on some observations, of which one piece is in memory at a time.

        Args:
            pieces: the observations.
            name: what to call them in the report.
            kind: of the observations.
            seen: is handed every piece with what the reference computed.

        Returns:
            One result per target.
        """
        for graphs in self._graphs:
            graphs.begin()
        for piece in pieces:
            reference = run_reference(self._checkpoint, piece)
            seen(piece, reference)
            for graphs in self._graphs:
                graphs.add(piece, reference)
            del piece  # before the next one is made
        return [graphs.result(name, kind) for graphs in self._graphs]

    def proves(self, cases: ReferenceCases) -> bool:
        """Whether all graphs keep the limits on reference cases."""
        proofs = [act_out(self._bundle, graphs.backend, cases) for graphs in self._graphs]
        return not any(proof.violations for proof in proofs)


class _Graphs:
    """One target's graphs beside the reference, end to end and stage by stage."""

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: AnyCheckpoint,
        frame: ReferenceCases,
        target: Target | None,
    ) -> None:
        self._bundle, self._checkpoint, self._frame = bundle, checkpoint, frame
        self._target, on_tensorrt = target, target == "tensorrt"
        run = TensorRTGraphs(bundle) if on_tensorrt else create_backend("onnxruntime", bundle)
        self.backend = run
        self._gpt = StageSession(bundle, "gpt", target)
        self._heads = StageSession(bundle, "code_heads", target)
        self._decoder = StageSession(bundle, "rvq_decoder", target)

    def begin(self) -> None:
        self._policy = PolicyCheck(self._bundle, self.backend, self._frame)
        self._prefetch = False
        self._alone = {name: StageComparison() for name in ("gpt", "code logits", "code_heads")}

    def add(self, piece: Piece, reference: Reference) -> None:
        expected = reference.outputs
        # Both ways to the same actions, on half of the pieces each.
        self._prefetch = not self._prefetch
        shapes, key = self._checkpoint.image_shapes, self._checkpoint.state_key
        observations = (
            {**unpack_frames(frames, shapes), key: state}
            for frames, state in zip(piece.frames, piece.states, strict=True)
        )
        self._policy.add(observations, expected, prefetch=self._prefetch)
        feature = self._gpt.run(reference.image_tokens, reference.states)[0]
        logits, offsets = self._heads.run(expected.feature)
        self._alone["gpt"].add(feature, expected.feature)
        self._alone["code logits"].add(centred(logits), centred(reference.logits))
        self._alone["code_heads"].add(offsets, reference.offsets)

    def result(self, name: str, kind: ObservationKind) -> Verification:
        whole, manifest = self._policy.proof, self._bundle.manifest
        graphs = manifest.graphs(self._target or manifest.targets[0])
        codes, decoder = code_pairs(self._checkpoint), StageComparison()
        decode = self._checkpoint.network.head.vqvae_model.decode
        decoder.add(self._decoder.run(codes.numpy())[0], decode(codes).numpy())
        stages = {
            # Its inputs are the observations themselves, so the whole policy ran it already.
            "vision_encoder": whole.stages["vision_encoder"],
            **{name: comparison.result for name, comparison in self._alone.items()},
            "rvq_decoder": decoder.result,
        }
        return Verification(
            observations=name,
            kind=kind,
            samples=whole.steps,
            stages=stages,
            precisions={name: graphs[_GRAPHS[name]].precision for name in stages},
            whole=whole,
            target=self._target,
        )
