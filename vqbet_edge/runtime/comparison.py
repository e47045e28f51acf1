"""How far a policy's outputs are from the reference's, and how far each precision may be.

Figures run along with a stream of outputs: nothing of it is kept, so memory does not depend on how
many observations are compared.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.sampling import Decision, softmax

Floats = NDArray[np.float32]


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


def cosines(outputs: NDArray[np.floating], reference: NDArray[np.floating]) -> NDArray[np.float64]:
    """float64 (M,): cosine of each of M outputs (M, ...) and its reference, as flat vectors.

    Two vectors of zeros point in the same direction.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (outputs, reference))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.float64] = np.where(
        norms == 0, 1.0, (a * b).sum(axis=1) / np.where(norms == 0, 1, norms)
    )
    return found


@dataclass(frozen=True)
class StageResult:
    """How far one stage is from the reference: the definitions are those of `Limits`."""

    max_error: float
    relative_error: float
    cosine: float

    def violations(self, name: str, limits: Limits) -> list[str]:
        """What breaks the limits, one line each."""
        return [
            *_above(f"{name}: relative error", self.relative_error, limits.relative_error),
            *_below(f"{name}: cosine", self.cosine, limits.cosine),
        ]


class StageComparison:
    """The worst figures of a stage over a stream of outputs."""

    def __init__(self) -> None:
        # NumPy's maximum, unlike Python's max, keeps a NaN.
        self._error = self._largest = np.float64(0)
        self._cosine = np.float64(1)

    def add(self, outputs: Floats, reference: Floats) -> None:
        """Compare (M, ...) with the reference of the same shape."""
        errors = np.abs(outputs.astype(np.float64) - reference)
        self._error = np.maximum(self._error, errors.max())
        self._largest = np.maximum(self._largest, np.abs(reference).max())
        self._cosine = np.minimum(self._cosine, cosines(outputs, reference).min())

    @property
    def result(self) -> StageResult:
        """The figures so far."""
        relative = self._error / max(self._largest, 1e-12)
        return StageResult(float(self._error), float(relative), float(self._cosine))


def worst(results: list[StageResult]) -> StageResult:
    """The worst of several outputs of one stage, each measure by itself."""
    return StageResult(
        float(np.max([result.max_error for result in results])),
        float(np.max([result.relative_error for result in results])),
        float(np.min([result.cosine for result in results])),
    )


@dataclass(frozen=True)
class PolicyResult:
    """How far the whole policy is from the reference, with the reference's codes forced.

    Attributes:
        action_error: largest, in the action's own units.
        relative_action_error: largest, relative to the range that normalises to [-1, 1].
        code_agreement: share of observations in which both arg-max codes agree, of those whose
            codes are clear of ties.
        probability_error: largest change of one code's probability.
        total_variation: mean distance between the code distributions, 0 to 1.
    """

    action_error: float
    relative_action_error: float
    code_agreement: float
    probability_error: float
    total_variation: float

    def violations(self, limits: Limits) -> list[str]:
        """What breaks the limits, one line each."""
        return [
            *_above("action error", self.relative_action_error, limits.relative_error),
            *_above("code probability error", self.probability_error, limits.probability_error),
            *_below("code agreement", self.code_agreement, limits.code_agreement),
        ]


class PolicyComparison:
    """Running figures of a whole policy.

    Args:
        action_multiply: (A,), what the action's un-normalisation multiplies by.
        temperature: of the code distribution.
    """

    def __init__(self, action_multiply: Floats, temperature: float) -> None:
        self._multiply, self._temperature = np.abs(action_multiply), temperature
        self._error = self._relative = self._probability = np.float64(0)
        self._steps = self._clear = self._agreeing = 0
        self._variation = 0.0

    def add(self, decision: Decision, logits: Floats, chunk: Floats, *, clear: bool = True) -> None:
        """Compare one decision with the reference's.

        Args:
            decision: the policy's.
            logits: (2, C), the reference's.
            chunk: (W, A), the reference's, normalised.
            clear: whether it counts for the agreement of codes.
        """
        errors = np.abs(decision.decoded_chunk + decision.offset_chunk - chunk).astype(np.float64)
        wanted, got = softmax(logits, self._temperature), decision.code_probabilities
        changes = np.abs(got - wanted)
        self._error = np.maximum(self._error, (errors * self._multiply).max())
        # Normalised actions span [-1, 1].
        self._relative = np.maximum(self._relative, errors.max() / 2)
        self._probability = np.maximum(self._probability, changes.max())
        self._variation += float(changes.sum(axis=-1).mean()) / 2
        self._steps += 1
        if clear:
            self._clear += 1
            self._agreeing += bool((got.argmax(axis=-1) == wanted.argmax(axis=-1)).all())

    @property
    def steps(self) -> int:
        """Decisions so far."""
        return self._steps

    @property
    def result(self) -> PolicyResult:
        """The figures so far."""
        return PolicyResult(
            action_error=float(self._error),
            relative_action_error=float(self._relative),
            code_agreement=self._agreeing / self._clear if self._clear else 1.0,
            probability_error=float(self._probability),
            total_variation=self._variation / self._steps,
        )


def _above(what: str, value: float, limit: float | None) -> list[str]:
    # Written so that NaN is a violation.
    return [] if limit is None or value <= limit else [f"{what} {value:.3g} is above {limit:g}"]


def _below(what: str, value: float, limit: float | None) -> list[str]:
    return [] if limit is None or value >= limit else [f"{what} {value:.6g} is below {limit:g}"]
