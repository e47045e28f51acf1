"""How far a policy's outputs are from the reference's, and how far each precision may be.

Direction and size are both judged: a cosine does not see a factor, so every output is also held to
its relative error and to its gain, the factor that fits it best to the reference. And what is the
same in all observations hides what is not: much of a frame's token does not depend on the frame. So
what changes between observations is held to a limit of its own.

Figures run along with a stream of outputs: little of it is kept, so memory hardly depends on how
many observations are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.sampling import softmax

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Probabilities are compared at the policy's temperature, but at no less than this share of the
# logits' own spread: below it they show rounding near ties instead of the network.
_BLUNTEST = 0.1
# Codes are clear of a tie when their logits are so many times further apart than nearly every
# observation's logits moved: other kernels round otherwise, but not that much.
_CLEARANCE, _NEARLY_ALL = 4.0, 0.9


@dataclass(frozen=True)
class Limits:
    """What a precision must keep; norms are over all values of all observations.

    Attributes:
        relative_error: norm of an output's error relative to the reference's norm; logits are
            centred first, because a softmax does not see what is added to all of them.
        varying: the same for what differs from the mean over all observations, relative to what the
            reference differs from its mean, or to `still` times the reference where it hardly does.
        still: share of the whole below which what varies is not told from rounding.
        gain: how far the factor that fits an output best to the reference may be from 1.
        cosine: smallest between an output and the reference's, per observation.
        peak: largest error of an output's value relative to the largest value; None is reported
            only.
        action: 99th percentile of the action's errors, relative to the action's spread.
        largest_action: the largest of them.
        total_variation: mean distance of the code distributions, 0 to 1; see `_BLUNTEST`.
        code_agreement: share of observations in which both most probable codes are the
            reference's, of those whose codes are clear of ties.
    """

    relative_error: float
    varying: float
    still: float
    gain: float
    cosine: float
    peak: float | None
    action: float
    largest_action: float
    total_variation: float
    code_agreement: float

    def behind(self, stages: int) -> "Limits":
        """Of a stage behind others that may each be as far off."""
        more = 1 + stages
        return replace(
            self,
            relative_error=self.relative_error * more**0.5,
            varying=self.varying * more**0.5,
            cosine=1 - (1 - self.cosine) * more,
        )


# What is float32 in every precision (tables, scalings) is held to the first.
LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(
        relative_error=1e-4, varying=1e-3, still=0.01, gain=1e-4, cosine=0.999999, peak=1e-4,
        action=1e-3, largest_action=5e-3, total_variation=1e-3, code_agreement=1.0,
    ),
    "fp16": Limits(
        relative_error=0.01, varying=0.1, still=0.01, gain=0.005, cosine=0.999, peak=None,
        action=0.02, largest_action=0.1, total_variation=0.01, code_agreement=0.99,
    ),
    "int8": Limits(
        relative_error=0.06, varying=0.4, still=0.1, gain=0.02, cosine=0.99, peak=None,
        action=0.1, largest_action=0.3, total_variation=0.05, code_agreement=0.97,
    ),
}  # fmt: skip


def cosines(outputs: NDArray[np.floating], reference: NDArray[np.floating]) -> Doubles:
    """float64 (M,): cosine of each of M outputs (M, ...) and its reference, as flat vectors.

    Two vectors of zeros point in the same direction.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (outputs, reference))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: Doubles = np.where(norms == 0, 1.0, (a * b).sum(axis=1) / np.where(norms == 0, 1, norms))
    return found


def centred(logits: NDArray[np.floating]) -> Doubles:
    """float64 (..., C): logits without their mean, which a softmax does not see."""
    wide = logits.astype(np.float64)
    found: Doubles = wide - wide.mean(axis=-1, keepdims=True)
    return found


@dataclass(frozen=True)
class StageResult:
    """How far one output is from the reference: the definitions are those of `Limits`.

    Attributes:
        max_error: largest error of a value.
        varying: error of what differs from the mean over all observations, relative to the norm of
            the whole reference.
        variation: what the reference differs from its mean, likewise.
    """

    max_error: float
    relative_error: float
    varying: float
    variation: float
    gain: float
    peak: float
    cosine: float

    def __str__(self) -> str:
        """All figures but the largest error."""
        varying = self.varying_error(0.0)
        errors = f"relative {self.relative_error:.2e}, of what varies {varying:.2e}"
        return f"{errors}, gain {self.gain:.5f}, cosine {self.cosine:.7f}"

    def varying_error(self, still: float) -> float:
        """Relative to what varies, or to `still` times the whole where that is less."""
        return self.varying / max(self.variation, still, 1e-12)

    def violations(self, name: str, limits: Limits) -> list[str]:
        """What breaks the limits, one line each."""
        varying = self.varying_error(limits.still)
        return [
            *_above(f"{name}: relative error", self.relative_error, limits.relative_error),
            *_above(f"{name}: error of what varies", varying, limits.varying),
            *_above(f"{name}: distance of the gain from 1", abs(self.gain - 1), limits.gain),
            *_above(f"{name}: largest error", self.peak, limits.peak),
            *_below(f"{name}: cosine", self.cosine, limits.cosine),
        ]


class StageComparison:
    """The figures of an output over a stream of observations."""

    def __init__(self) -> None:
        # NumPy's maximum, unlike Python's max, keeps a NaN.
        self._error = self._largest = np.float64(0)
        self._cosine = np.float64(1)
        self._errors = self._squares = self._products = np.float64(0)
        # Sums over observations, to take the mean off.
        self._observations = 0
        self._error_sum: Doubles | float = 0.0
        self._sum: Doubles | float = 0.0

    def add(self, outputs: NDArray[np.floating], reference: NDArray[np.floating]) -> None:
        """Compare (M, ...) with the reference of the same shape."""
        got, wanted = outputs.astype(np.float64), reference.astype(np.float64)
        errors = got - wanted
        self._error = np.maximum(self._error, np.abs(errors).max())
        self._largest = np.maximum(self._largest, np.abs(wanted).max())
        self._cosine = np.minimum(self._cosine, cosines(got, wanted).min())
        self._errors += (errors**2).sum()
        self._squares += (wanted**2).sum()
        self._products += (got * wanted).sum()
        self._observations += len(got)
        self._error_sum = self._error_sum + errors.sum(axis=0)
        self._sum = self._sum + wanted.sum(axis=0)

    @property
    def result(self) -> StageResult:
        """The figures so far."""
        size = max(self._squares, 1e-24)

        def varying(squares: np.float64, sums: Doubles | float) -> float:
            left = squares - (np.asarray(sums) ** 2).sum() / max(self._observations, 1)
            # A difference of sums may round to below zero.
            return float(np.sqrt(np.maximum(left, 0) / size))

        return StageResult(
            max_error=float(self._error),
            relative_error=float(np.sqrt(self._errors / size)),
            varying=varying(self._errors, self._error_sum),
            variation=varying(self._squares, self._sum),
            # Where the reference is zero, any factor fits.
            gain=float(self._products / size) if self._squares else 1.0,
            peak=float(self._error / max(self._largest, 1e-12)),
            cosine=float(self._cosine),
        )


@dataclass(frozen=True)
class PolicyResult:
    """How far the whole policy is from the reference, with the reference's codes forced.

    Attributes:
        action_error: largest, in the action's own units.
        action: 99th percentile of the errors relative to the spread of the actions that the
            reference chooses among.
        largest_action: the largest of them.
        total_variation: mean distance of the code distributions, 0 to 1.
        largest_variation: the largest of them.
        code_agreement: share of observations in which both most probable codes agree, of those
            whose codes are clear of ties.
        clear: share of observations whose codes are; where few are, agreement tells little, and
            the logits' own figures have to do.
        logit_error: what nearly all observations' centred logits moved by at most.
    """

    action_error: float
    action: float
    largest_action: float
    total_variation: float
    largest_variation: float
    code_agreement: float
    clear: float
    logit_error: float

    def violations(self, limits: Limits) -> list[str]:
        """What breaks the limits, one line each."""
        return [
            *_above("action error (99 %), of its spread", self.action, limits.action),
            *_above("action error, of its spread", self.largest_action, limits.largest_action),
            *_above("total variation of the codes", self.total_variation, limits.total_variation),
            *_below("agreement of clear codes", self.code_agreement, limits.code_agreement),
        ]


class PolicyComparison:
    """Running figures of a whole policy.

    Args:
        spread: float32 (A,), of the actions that the reference chooses among, in the robot's units.
        temperature: the reference's.
    """

    def __init__(self, spread: Floats, temperature: float) -> None:
        self._spread, self._temperature = np.maximum(spread, 1e-12).astype(np.float64), temperature
        self._error = np.float64(0)
        self._errors: list[Doubles] = []
        # Per decision: variation, the codes' lead, what logits moved by, whether codes agree.
        self._figures: list[tuple[float, ...]] = []
        self._marked: list[bool] = []

    def add(
        self,
        chunk: Floats,
        actions: Floats,
        logits: Floats,
        wanted: Floats,
        *,
        clear: bool | None = None,
    ) -> None:
        """Compare one decision with the reference's.

        Args:
            chunk: (W, A), what the policy returned, in the robot's units.
            actions: (W, A), the reference's.
            logits: (2, C), of both layers, the secondary ones given the reference's primary code.
            wanted: (2, C), the reference's.
            clear: whether the codes are clear of a tie; None decides by what all logits move.
        """
        errors = action_errors(chunk, actions)
        self._error = np.maximum(self._error, errors.max())
        self._errors.append(errors / self._spread)
        got, reference = centred(logits), centred(wanted)
        blunt = np.maximum(self._temperature, _BLUNTEST * reference.std(axis=-1, keepdims=True))
        changes = softmax(got / blunt) - softmax(reference / blunt)
        variation = float(np.abs(changes).sum(axis=-1).mean()) / 2
        agree = (got.argmax(axis=-1) == reference.argmax(axis=-1)).all()
        moved = np.abs(got - reference).max()
        self._figures.append((variation, float(code_leads(wanted)), float(moved), float(agree)))
        if clear is not None:
            self._marked.append(clear)

    @property
    def steps(self) -> int:
        """Decisions so far."""
        return len(self._errors)

    @property
    def result(self) -> PolicyResult:
        """The figures so far."""
        errors = np.concatenate([values.reshape(-1) for values in self._errors])
        variations, leads, moves, agree = np.array(self._figures).T
        moved = float(np.quantile(moves, _NEARLY_ALL))
        clear = np.array(self._marked or clear_of_ties(leads, moved))
        return PolicyResult(
            action_error=float(self._error),
            action=float(np.quantile(errors, 0.99)),
            largest_action=float(errors.max()),
            total_variation=float(variations.mean()),
            largest_variation=float(variations.max()),
            code_agreement=float(agree[clear].mean()) if clear.any() else 1.0,
            clear=float(clear.mean()),
            logit_error=moved,
        )


def action_errors(chunk: Floats, actions: Floats) -> Doubles:
    """float64, of the same shape: what is more than float32 can hold of an action far from zero."""
    wanted = actions.astype(np.float64)
    unit = 4 * np.finfo(np.float32).eps * np.abs(wanted)
    found: Doubles = np.maximum(np.abs(chunk.astype(np.float64) - wanted) - unit, 0)
    return found


class CodeComparison:
    """The worst of many codes' outputs, each by a number (see `cases.prints`).

    So a code counts whether or not it is the most probable one of any observation.
    """

    def __init__(self) -> None:
        self._errors: Doubles | float = 0.0
        self._squares: Doubles | float = 0.0

    def add(self, outputs: NDArray[np.floating], reference: NDArray[np.floating]) -> None:
        """Compare what one observation gives for every code (...)."""
        wanted = reference.astype(np.float64)
        self._errors = self._errors + (outputs.astype(np.float64) - wanted) ** 2
        self._squares = self._squares + wanted**2

    @property
    def result(self) -> float:
        """Largest relative error of a code; small ones are taken relative to the usual size."""
        squares = np.maximum(self._squares, max(float(np.mean(self._squares)), 1e-24))
        return float(np.sqrt(self._errors / squares).max())


def code_leads(logits: NDArray[np.floating]) -> Doubles:
    """float64 (...): by how much the most probable code's logit leads, in the closer layer.

    Args:
        logits: (..., 2, C), of both layers.
    """
    if logits.shape[-1] == 1:  # nothing leads and nothing follows
        return np.full(logits.shape[:-2], np.inf)
    ordered = np.sort(logits.astype(np.float64), axis=-1)
    found: Doubles = (ordered[..., -1] - ordered[..., -2]).min(axis=-1)
    return found


def clear_of_ties(leads: Doubles, moved: float) -> NDArray[np.bool_]:
    """Bool (M,): whether rounding that moves logits by so much cannot exchange the codes."""
    found: NDArray[np.bool_] = leads > _CLEARANCE * moved
    return found


def _above(what: str, value: float, limit: float | None) -> Iterator[str]:
    # Written so that NaN is a violation.
    if limit is not None and not value <= limit:
        yield f"{what} {value:.3g} is above {limit:.3g}"


def _below(what: str, value: float, limit: float) -> Iterator[str]:
    if not value >= limit:
        yield f"{what} {value:.6g} is below {limit:.6g}"
