"""The discrete decision: which code pair, and which action chunk it stands for."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import NonFiniteError
from vqbet_edge.runtime.backends.base import Floats, HeadOutputs

Codes = NDArray[np.int64]
Probabilities = NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.floating)


@dataclass(frozen=True)
class Decision:
    """What the policy decided at its latest re-planning step.

    Attributes:
        step: of the observation that it was made on, from 0 at the reset.
        codes: int64 (2,), primary and secondary code.
        code_probabilities: float64 (2, C), what they were drawn from; of a greedy policy, what a
            policy at the checkpoint's temperature would have drawn them from.
        draws: float64 (2,), the random numbers in [0, 1) that they were drawn with, used or not.
        decoded_chunk: float32 (W, A), normalised, what the RVQ decoder makes of the codes.
        offset_chunk: float32 (W, A), normalised, what the offset head adds to it.
        action_chunk: float32 (W, A), in the robot's units: their sum, within the action limits.
        clamped: bool (W, A), where the chunk left the action limits and was clamped.
        seconds: stage name -> seconds of its latest run.
    """

    step: int
    codes: Codes
    code_probabilities: Probabilities
    draws: NDArray[np.float64]
    decoded_chunk: Floats
    offset_chunk: Floats
    action_chunk: Floats
    clamped: NDArray[np.bool_]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """A code pair (2,), the probabilities (2, C) and the random numbers (2,) it was drawn with."""

    codes: Codes
    probabilities: Probabilities
    draws: NDArray[np.float64]


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> Probabilities:
    """float64 (..., C): the distribution over codes (paper, section 3.3)."""
    scores = logits.astype(np.float64)
    weights = np.exp((scores - scores.max(axis=-1, keepdims=True)) / temperature)
    normalized: Probabilities = weights / weights.sum(axis=-1, keepdims=True)
    return normalized


class CodeSampler:
    """Draws code pairs from the softmax of the code logits (paper, section 3.3).

    Args:
        temperature: the softmax's temperature; 0 takes the most probable code.
        trained_temperature: the checkpoint's, for the probabilities of a greedy choice.
        secondary_columns: float32 (C, C), row p is what the primary code p adds to the secondary
            logits; of bundles of format 2 that select codes sequentially.
        seed: start of the random sequence (PCG64, the same on every platform).
    """

    def __init__(
        self,
        temperature: float,
        trained_temperature: float,
        secondary_columns: Floats | None,
        seed: int,
    ) -> None:
        self._greedy = temperature == 0
        self._temperature = trained_temperature if self._greedy else temperature
        self._columns = secondary_columns
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the random sequence over."""
        self._random = np.random.Generator(np.random.PCG64(seed))

    def choose(self, outputs: HeadOutputs, forced: Codes | None = None) -> Choice:
        """Draw a code pair, or take the `forced` one (2,).

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        # Two numbers per decision, used or not: what was forced or greedy once does not shift
        # the rest of the sequence.
        uniforms = self._random.random(2)
        # Both layers before the first code: neither is chosen from a bad prediction.
        logits = _finite(outputs.logits).astype(np.float64)
        first = softmax(logits[0], self._temperature)
        primary = int(self._draw(logits[0], first, uniforms[0]) if forced is None else forced[0])
        row = _finite(secondary_row(logits, primary, self._columns))
        second = softmax(row, self._temperature)
        secondary = self._draw(row, second, uniforms[1]) if forced is None else forced[1]
        codes = np.array([primary, secondary], np.int64)
        return Choice(codes, np.stack([first, second]), uniforms)

    def _draw(self, logits: Probabilities, probabilities: Probabilities, uniform: float) -> int:
        return int(logits.argmax()) if self._greedy else draw_code(probabilities, uniform)


def draw_code(probabilities: Probabilities, uniform: float) -> int:
    """Invert the cumulative distribution (C,) at `uniform` in [0, 1)."""
    cumulative = probabilities.cumsum()
    # The sum may round to below 1: scaling keeps every draw inside the last code.
    return int((cumulative <= uniform * cumulative[-1]).sum())


def secondary_row(logits: NDArray[Scalar], primary: int, columns: Floats | None) -> NDArray[Scalar]:
    """Of logits (1 + R, C): the secondary ones (C,) given the primary code; see `CodeSampler`."""
    row: NDArray[Scalar] = logits[1 + primary if len(logits) > 2 else 1]
    if columns is not None:
        row = row + columns[primary]
    return row


def _finite(logits: NDArray[Scalar]) -> NDArray[Scalar]:
    # An arg-max or a search in NaN finds code 0, which is a perfectly valid one.
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            "the code logits are not finite, so no code is chosen from them; check the camera and "
            "the state, and export with --fp32 if this is an FP16 bundle"
        )
    return logits
