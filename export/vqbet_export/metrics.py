"""How far an export may be, and is, from the policy in PyTorch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vqbet_calibration.targets import Target

from vqbet_edge.runtime.manifest import Precision, StageName, VerificationSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class Limits:
    """What a precision must keep; None means reported only.

    Attributes:
        relative_error: largest error of a stage's output relative to its largest value, and of
            the action relative to its range.
        probability_error: largest change of one code's probability.
        cosine: smallest cosine between a stage's output and the reference's, per observation.
        code_agreement: share of observations in which both arg-max codes are the reference's.
    """

    relative_error: float | None = None
    probability_error: float | None = None
    cosine: float | None = None
    code_agreement: float | None = None


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(relative_error=1e-4, probability_error=1e-3),
    "fp16": Limits(cosine=0.999, code_agreement=0.99),
    "int8": Limits(cosine=0.99, code_agreement=0.97),
}


@dataclass(frozen=True)
class StageResult:
    """How far one stage is from PyTorch: the definitions are those of `Limits`."""

    max_error: float
    relative_error: float
    cosine: float

    @classmethod
    def compare(cls, outputs: Array, reference: Array) -> "StageResult":
        """Compare (samples, ...) with the reference of the same shape."""
        a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (outputs, reference))
        error = float(np.abs(a - b).max())
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        # Two zero vectors point in the same direction.
        cosines = np.where(norms == 0, 1.0, (a * b).sum(axis=1) / np.where(norms == 0, 1, norms))
        return cls(error, error / max(float(np.abs(b).max()), 1e-12), float(cosines.min()))

    @classmethod
    def worst(cls, results: Iterable["StageResult"]) -> "StageResult":
        """The worst of several outputs of one stage, each measure by itself."""
        rows = np.array([(r.max_error, r.relative_error, -r.cosine) for r in results])
        error, relative, negative_cosine = rows.max(axis=0).tolist()
        return cls(error, relative, -negative_cosine)


@dataclass(frozen=True)
class PolicyResult:
    """How far the whole bundle is from PyTorch, with the reference's codes forced.

    Attributes:
        action_error: largest, in the action's own units.
        relative_action_error: largest, relative to the range that normalises to [-1, 1].
        code_agreement: share of observations in which both arg-max codes agree.
        probability_error: largest change of one code's probability.
        total_variation: mean distance between the code distributions, 0 to 1.
    """

    action_error: float
    relative_action_error: float
    code_agreement: float
    probability_error: float
    total_variation: float


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
        policy = self.policy
        found = [
            *_above("action error", policy.relative_action_error, limits.relative_error),
            *_above("code probability error", policy.probability_error, limits.probability_error),
            *_below("code agreement", policy.code_agreement, limits.code_agreement),
        ]
        for name, stage in self.stages.items():
            found += _above(f"{name}: relative error", stage.relative_error, limits.relative_error)
            found += _below(f"{name}: cosine", stage.cosine, limits.cosine)
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


def _above(what: str, value: float, limit: float | None) -> list[str]:
    # Written so that NaN is a violation.
    return [] if limit is None or value <= limit else [f"{what} {value:.3g} is above {limit:g}"]


def _below(what: str, value: float, limit: float | None) -> list[str]:
    return [] if limit is None or value >= limit else [f"{what} {value:.6g} is below {limit:g}"]
