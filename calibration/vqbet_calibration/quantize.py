"""INT8 graphs of a policy: layers and methods chosen by what they do to the decision."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import onnx
import onnxruntime

from vqbet_calibration.blocks import Blocks
from vqbet_calibration.chain import Chain, Outcome, encoder_feeds, gpt_feeds
from vqbet_calibration.graphs import GraphSession, Quantizer, layers
from vqbet_calibration.samples import Samples
from vqbet_calibration.static import Static, collect_ranges
from vqbet_edge.errors import VerificationError
from vqbet_edge.runtime.backends.kernels import has_kernel_for_blocks
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName, Target

Progress = Callable[[str], None]

# What carries the arithmetic. The heads, and the projection before them, are the decision itself:
# a few small products, where eight bits save nothing and may change the codes.
STAGES: tuple[StageName, ...] = ("vision_encoder", "gpt")
DECISION = "lm_head"
_SLOW = (
    "On this computer the quantised transformer takes several times as long as the one in float32: "
    "ONNX Runtime has no fast kernel for MatMulNBits here. Measure on the robot before choosing "
    "INT8, or upgrade ONNX Runtime on both."
)
# An order needs fewer observations than a limit does: of so many, the transformer sees every other.
_RANKED_OBSERVATIONS, _RANKED_STRIDE = 64, 2


# Per stage, layer -> method; the others stay in floating point.
Plan = Mapping[StageName, Mapping[str, str]]
Quantizers = Mapping[StageName, Quantizer]


@dataclass(frozen=True)
class Goal:
    """What the quantised chain must keep on held-out observations.

    Stricter than the export's limits: those are checked on observations never seen, where what was
    chosen here keeps up to two points less of the codes. The total variation is the finer measure:
    of a few hundred observations one more or less agrees by chance.
    """

    cosine: float = 0.999
    code_agreement: float = 0.98
    total_variation: float = 0.006

    def reached(self, outcome: Outcome) -> bool:
        """Whether an outcome is good enough."""
        cosines_do = all(value >= self.cosine for value in outcome.cosine.values())
        codes_do = outcome.code_agreement >= self.code_agreement
        return cosines_do and codes_do and outcome.total_variation <= self.total_variation


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one layer alone, the cheapest way, does."""

    stage: StageName
    layer: str
    outcome: Outcome


@dataclass(frozen=True)
class Quantization:
    """How a target's graphs were quantised.

    Attributes:
        target: whose kernels the graphs are for.
        by_method: what every layer quantised by a method does to the chain, per stage.
        ranking: every layer alone, the most harmful first.
        plan: what is done to every layer.
        kept: layers left in floating point, the most harmful first, then the decision's.
        outcome: of all quantised graphs together, on held-out samples.
        notes: what else to know.
        quantizers: to quantise graphs of a stage with, see `twin`.
    """

    target: Target
    by_method: dict[StageName, dict[str, Outcome]]
    ranking: tuple[Sensitivity, ...]
    plan: Plan
    kept: tuple[str, ...]
    outcome: Outcome
    notes: tuple[str, ...]
    quantizers: Quantizers

    def twin(self, stage: StageName, graph: bytes) -> bytes:
        """A graph of a stage, such as the float16 one, quantised as was found best."""
        return self.quantizers[stage].of_twin(graph).quantize(graph, self.plan[stage])

    def report(self) -> dict[str, Any]:
        """Everything but the graphs, as plain data."""
        return {
            "target": self.target,
            "by_method": msgspec.to_builtins(self.by_method),
            "plan": msgspec.to_builtins(self.plan),
            "kept": list(self.kept),
            "outcome": asdict(self.outcome),
            "ranking": msgspec.to_builtins(self.ranking),
            "notes": list(self.notes),
        }


def quantize(
    bundle: Bundle,
    samples: Samples,
    targets: Sequence[Target],
    progress: Progress = lambda _: None,
    goal: Goal | None = None,
) -> tuple[Quantization, ...]:
    """Quantise a policy's encoder and transformer.

    Args:
        bundle: the policy in float32.
        samples: what the robot sees.
        targets: whose kernels to quantise for; the float32 policy runs once for all of them.
        progress: is told what happens next.
        goal: what to keep; None takes the usual.

    Raises:
        UsageError: ONNX Runtime is too old.
        VerificationError: the goal is out of reach.
    """
    progress(f"calibrating on {samples.observations} observations")
    quantizers = _quantizers(bundle, samples, targets)
    rankings = _rankings(bundle, samples, quantizers, progress)
    chain = Chain(bundle, samples.held_out)
    searches = [_Search(t, quantizers[t], chain, bundle, progress) for t in targets]
    return tuple(s.choose(rankings[s.target], goal or Goal()) for s in searches)


def _quantizers(
    bundle: Bundle, samples: Samples, targets: Sequence[Target]
) -> dict[Target, Quantizers]:
    encoder, gpt = (bundle.graph(stage) for stage in STAGES)
    of_encoder = collect_ranges(encoder, encoder_feeds(bundle, samples.calibration))
    found: dict[Target, Quantizers] = {}
    if "tensorrt" in targets:
        of_gpt = collect_ranges(gpt, gpt_feeds(bundle, samples.calibration))
        found["tensorrt"] = {
            "vision_encoder": Static(encoder, "tensorrt", of_encoder),
            "gpt": Static(gpt, "tensorrt", of_gpt),
        }
    if "cpu" in targets:
        static = Static(encoder, "cpu", of_encoder)
        found["cpu"] = {"vision_encoder": static, "gpt": Blocks(gpt)}
    return found


def _rankings(
    bundle: Bundle, samples: Samples, quantizers: Mapping[Target, Quantizers], progress: Progress
) -> dict[Target, tuple[Sensitivity, ...]]:
    """Every layer alone, the decision's too; the most harmful first.

    What lies before a layer is computed once, for all that comes behind and for every target.
    """
    chain = Chain(bundle, samples.held_out.spread(_RANKED_OBSERVATIONS), _RANKED_STRIDE)
    found: dict[Target, list[Sensitivity]] = {target: [] for target in quantizers}
    for stage in STAGES:
        for part in chain.parts(stage):
            names = [layer.name for layer in layers(onnx.load_from_string(part.graph))]
            progress(f"sensitivity of {stage}: {', '.join(names)}")
            for target, by_stage in quantizers.items():
                quantizer = by_stage[stage]
                for name in filter(quantizer.layers.__contains__, names):
                    graph = quantizer.quantize(part.graph, {name: quantizer.methods[0]})
                    session = GraphSession(graph, optimize=target == "cpu")
                    found[target].append(Sensitivity(stage, name, part.outcome(session)))
    return {t: tuple(sorted(f, key=lambda entry: -entry.outcome.damage)) for t, f in found.items()}


@dataclass(frozen=True)
class _Search:
    """Tries quantised graphs for one target on held-out samples."""

    target: Target
    quantizers: Quantizers
    chain: Chain
    bundle: Bundle
    progress: Progress
    # The latest of every stage, with its plan.
    sessions: dict[StageName, tuple[Mapping[str, str], GraphSession]] = field(default_factory=dict)

    def choose(self, ranking: tuple[Sensitivity, ...], goal: Goal) -> Quantization:
        """Quantise as cheaply as reaches the goal."""
        by_method = {stage: self._by_method(stage) for stage in STAGES}
        harmful = [entry for entry in ranking if entry.layer != DECISION]
        plan, outcome = self._cheapest(harmful, goal)
        kept = [f"{e.stage}.{e.layer}" for e in harmful if e.layer not in plan[e.stage]]
        kept += [f"gpt.{name}" for name in self.quantizers["gpt"].layers if name == DECISION]
        slow = self.target == "cpu" and not has_kernel_for_blocks(onnxruntime)
        return Quantization(
            target=self.target,
            by_method=by_method,
            ranking=ranking,
            plan=plan,
            kept=tuple(kept),
            outcome=outcome,
            notes=(_SLOW,) if slow else (),
            quantizers=self.quantizers,
        )

    def _by_method(self, stage: StageName) -> dict[str, Outcome]:
        """Every layer of the stage quantised, per method."""
        quantizer, outcomes = self.quantizers[stage], {}
        # The cheapest one last: its session is what the search begins with.
        for method in reversed(quantizer.methods):
            self.progress(f"{self.target}: {stage} by {method}")
            plan = dict.fromkeys(self._layers(stage), method)
            outcomes[method] = self.chain.outcome({stage: self._session(stage, plan)})
        return outcomes

    def _layers(self, stage: StageName) -> list[str]:
        return [name for name in self.quantizers[stage].layers if name != DECISION]

    def _session(self, stage: StageName, plan: Mapping[str, str]) -> GraphSession:
        if stage not in self.sessions or self.sessions[stage][0] != plan:
            graph = self.quantizers[stage].quantize(self.bundle.graph(stage), plan)
            session = GraphSession(graph, optimize=self.target == "cpu")
            self.sessions[stage] = plan, session
        return self.sessions[stage][1]

    def _cheapest(self, harmful: Sequence[Sensitivity], goal: Goal) -> tuple[Plan, Outcome]:
        """Be more exact with the most harmful layers, as few as reach the goal."""
        outcomes: dict[int, Outcome] = {}

        def reached(count: int) -> bool:
            self.progress(f"{self.target}: {count} of {len(harmful)} layers more exactly")
            plan = self._plan(harmful[:count])
            outcomes[count] = self.chain.outcome({s: self._session(s, plan[s]) for s in STAGES})
            return goal.reached(outcomes[count])

        # None is tried first: mostly it does.
        counts = range(len(harmful))
        enough = 0 if reached(0) else bisect_left(counts, x=True, lo=1, key=reached)
        if enough == len(harmful):
            raise VerificationError(
                "no layer can be quantised within the limits; export with --fp16, or calibrate on "
                "more observations of the robot at work"
            )
        return self._plan(harmful[:enough]), outcomes[enough]

    def _plan(self, harmful: Sequence[Sensitivity]) -> Plan:
        """The cheapest method for all layers but some, the most harmful first.

        Of those, the first are left in floating point; where a stage has several methods, those
        behind them get the most exact one, and so on.
        """
        plan = {s: dict.fromkeys(self._layers(s), self.quantizers[s].methods[0]) for s in STAGES}
        for rank, entry in enumerate(harmful):
            methods = self.quantizers[entry.stage].methods
            step = 1 + len(methods) * (len(harmful) - 1 - rank) // len(harmful)
            if step < len(methods):
                plan[entry.stage][entry.layer] = methods[step]
            else:
                del plan[entry.stage][entry.layer]
        return plan
