"""INT8 graphs of a policy: ranges, layers and methods chosen by what they do to the decision."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from vqbet_calibration.chain import Chain, Outcome
from vqbet_calibration.quantizers import Dynamic, Quantizer, Static
from vqbet_calibration.samples import Samples
from vqbet_calibration.targets import Target
from vqbet_edge.errors import VerificationError, VQBeTEdgeError
from vqbet_edge.runtime.backends.private_files import private_user_cache
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName

Progress = Callable[[str], None]

# What carries the arithmetic. The heads, and the projection before them, are the decision itself:
# a few small products, where eight bits save nothing and may change the codes.
STAGES: tuple[StageName, ...] = ("vision_encoder", "gpt")
DECISION = "lm_head"
# Bump when the placement changes, so that cached figures are measured anew.
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Goal:
    """What the quantised chain must keep on held-out observations.

    Stricter than the export's limits: those are checked on observations never seen, where what was
    chosen here keeps up to two points less of the codes. The total variation is the finer measure:
    of a few hundred observations one more or less agrees by chance.
    """

    cosine: float = 0.995
    code_agreement: float = 0.98
    total_variation: float = 0.006

    def reached(self, outcome: Outcome) -> bool:
        """Whether an outcome is good enough."""
        cosines_do = all(value >= self.cosine for value in outcome.cosine.values())
        codes_do = outcome.code_agreement >= self.code_agreement
        return cosines_do and codes_do and outcome.total_variation <= self.total_variation


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one layer alone does."""

    stage: StageName
    layer: str
    outcome: Outcome


@dataclass(frozen=True)
class Quantization:
    """How a target's graphs were quantised.

    Attributes:
        target: whose kernels the graphs are for.
        methods: how ranges were chosen, per stage.
        by_method: what every layer quantised by a method does to the chain, per stage.
        ranking: every layer alone, the most harmful first.
        kept: layers left in floating point, the most harmful first, then the decision's.
        outcome: of all quantised graphs together, on held-out samples.
        quantizers: to quantise graphs of a stage with, see `twin`.
    """

    target: Target
    methods: dict[StageName, str]
    by_method: dict[StageName, dict[str, Outcome]]
    ranking: tuple[Sensitivity, ...]
    kept: tuple[str, ...]
    outcome: Outcome
    quantizers: Mapping[StageName, Quantizer]

    def twin(self, stage: StageName, graph: bytes) -> bytes:
        """A graph of a stage, such as the float16 one, quantised as was found best."""
        quantizer = self.quantizers[stage]
        names = [name for name in quantizer.layers if f"{stage}.{name}" not in self.kept]
        return quantizer.quantize(names, self.methods[stage], graph)

    def report(self) -> dict[str, Any]:
        """Everything but the graphs, as plain data."""
        return {
            "target": self.target,
            "methods": self.methods,
            "by_method": {
                stage: {method: asdict(outcome) for method, outcome in outcomes.items()}
                for stage, outcomes in self.by_method.items()
            },
            "kept": list(self.kept),
            "outcome": asdict(self.outcome),
            "ranking": [asdict(entry) for entry in self.ranking],
        }


def quantize(
    bundle: Bundle,
    samples: Samples,
    target: Target,
    progress: Progress = lambda _: None,
    goal: Goal | None = None,
) -> Quantization:
    """Quantise a policy's encoder and transformer.

    Args:
        bundle: the policy in float32.
        samples: what the robot sees.
        target: whose kernels the graphs are for.
        progress: is told what happens next.
        goal: what to keep; None takes the usual.

    Raises:
        VerificationError: the goal is out of reach.
    """
    progress(f"{target}: calibrating on {samples.observations} observations")
    quantizers = _quantizers(bundle, Chain(bundle, samples.calibration), target)
    search = _Search(bundle, Chain(bundle, samples.held_out), quantizers, progress)
    by_method = {stage: search.by_method(stage) for stage in STAGES}
    methods = {s: min(found, key=lambda m: found[m].damage) for s, found in by_method.items()}
    ranking = search.ranking(methods, f"{target} {samples.digest}")
    kept, outcome = search.fewest_kept(methods, ranking, goal or Goal())
    decision = tuple(f"gpt.{name}" for name in quantizers["gpt"].layers if name == DECISION)
    return Quantization(
        target, methods, by_method, ranking, (*kept, *decision), outcome, quantizers
    )


def _quantizers(bundle: Bundle, chain: Chain, target: Target) -> dict[StageName, Quantizer]:
    def static(stage: StageName) -> Static:
        return Static.calibrate(bundle.graph(stage), target, chain.feeds(stage))

    transformer = static("gpt") if target == "tensorrt" else Dynamic(bundle.graph("gpt"))
    return {"vision_encoder": static("vision_encoder"), "gpt": transformer}


@dataclass(frozen=True)
class _Search:
    """Tries quantised graphs on held-out samples."""

    bundle: Bundle
    chain: Chain
    quantizers: Mapping[StageName, Quantizer]
    progress: Progress

    def layers(self, stage: StageName) -> list[str]:
        return [name for name in self.quantizers[stage].layers if name != DECISION]

    def by_method(self, stage: StageName) -> dict[str, Outcome]:
        """Every layer of the stage quantised, per method."""
        outcomes, quantizer = {}, self.quantizers[stage]
        for method in quantizer.methods:
            self.progress(f"{stage}: ranges by {method}")
            graph = quantizer.quantize(self.layers(stage), method)
            outcomes[method] = self.chain.outcome({stage: graph})
        return outcomes

    def ranking(self, methods: Mapping[StageName, str], key: str) -> tuple[Sensitivity, ...]:
        """Every layer alone, the decision's too; the most harmful first. Takes minutes: cached."""
        graphs = b"".join(self.bundle.graph(stage) for stage in (*STAGES, "code_heads"))
        facts = f"{_CACHE_VERSION} {key} {sorted(methods.items())}".encode()
        path = f"sensitivity-{hashlib.sha256(facts + graphs).hexdigest()[:32]}.json"
        with suppress(VQBeTEdgeError, OSError, msgspec.DecodeError):
            cached = (private_user_cache() / path).read_bytes()
            return msgspec.json.decode(cached, type=tuple[Sensitivity, ...])
        todo = [(stage, name) for stage in STAGES for name in self.quantizers[stage].layers]
        found = []
        for i, (stage, name) in enumerate(todo):
            self.progress(f"sensitivity of layer {i + 1} of {len(todo)} ({stage}: {name})")
            graph = self.quantizers[stage].quantize([name], methods[stage])
            found.append(Sensitivity(stage, name, self.chain.outcome({stage: graph})))
        ranking = tuple(sorted(found, key=lambda entry: -entry.outcome.damage))
        with suppress(VQBeTEdgeError, OSError):  # a full disk costs time, not the export
            (private_user_cache() / path).write_bytes(msgspec.json.encode(ranking))
        return ranking

    def fewest_kept(
        self, methods: Mapping[StageName, str], ranking: Sequence[Sensitivity], goal: Goal
    ) -> tuple[tuple[str, ...], Outcome]:
        """Keep the most harmful layers in floating point, as few as reach the goal."""
        harmful = [(entry.stage, entry.layer) for entry in ranking if entry.layer != DECISION]
        enough: dict[int, Outcome] = {}
        # None is tried first: mostly it does. From then on the interval is halved.
        low, tried, high = 0, 0, len(harmful) - 1
        while low <= high:
            self.progress(f"leaving out {tried} of {len(harmful)} layers")
            outcome = self.chain.outcome(self._graphs(methods, set(harmful[:tried])))
            if goal.reached(outcome):
                enough[tried], high = outcome, tried - 1
            else:
                low = tried + 1
            tried = (low + high) // 2
        if not enough:
            raise VerificationError(
                "no layer can be quantised within the limits; export with --fp16, or calibrate on "
                "more observations of the robot at work"
            )
        fewest = min(enough)
        return tuple(f"{stage}.{name}" for stage, name in harmful[:fewest]), enough[fewest]

    def _graphs(
        self, methods: Mapping[StageName, str], kept: set[tuple[StageName, str]]
    ) -> dict[StageName, bytes]:
        return {
            stage: self.quantizers[stage].quantize(
                [name for name in self.layers(stage) if (stage, name) not in kept], methods[stage]
            )
            for stage in STAGES
        }
