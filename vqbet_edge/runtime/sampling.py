"""The discrete decision: which code pair, and which action chunk it stands for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import NonFiniteError
from vqbet_edge.runtime.backends.base import Floats, HeadOutputs

Codes = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """What the policy decided at its latest re-planning step, without the batch axis of 1.

    Attributes:
        codes: int64 (2,), primary and secondary code.
        code_probabilities: float64 (2, C), what they were drawn from.
        decoded_chunk: float32 (W, A), normalised, what the RVQ decoder makes of the codes.
        offset_chunk: float32 (W, A), normalised, what the offset head adds to it.
        clamped: bool (W, A), where the chunk left the action limits and was clamped.
        seconds: stage name -> seconds of its latest run.
    """

    codes: Codes
    code_probabilities: Probabilities
    decoded_chunk: Floats
    offset_chunk: Floats
    clamped: NDArray[np.bool_]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """Code pairs (B, 2) and the probabilities (B, 2, C) they were drawn from."""

    codes: Codes
    probabilities: Probabilities


class CodeSampler:
    """Draws code pairs from the softmax of the code logits (paper, section 3.3).

    Args:
        temperature: the softmax's temperature; 0 takes the most probable code.
        secondary_columns: float32 (C, C) when codes are selected sequentially: row p is what the
            primary code p adds to the secondary logits.
        seed: start of the random sequence (PCG64, the same on every platform).
    """

    def __init__(self, temperature: float, secondary_columns: Floats | None, seed: int) -> None:
        self._temperature = temperature
        self._columns = secondary_columns
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the random sequence over."""
        self._random = np.random.Generator(np.random.PCG64(seed))

    def choose(self, outputs: HeadOutputs, forced: Codes | None = None) -> Choice:
        """Draw a code pair for every row, or take the `forced` ones (B, 2).

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        logits = _finite(outputs.logits.astype(np.float64))  # (B, 2, C)
        # Two numbers per decision, used or not: what was forced or greedy once does not shift
        # the rest of the sequence.
        uniforms = self._random.random((2, len(logits)))
        primary, secondary = (None, None) if forced is None else forced.T
        first = self._probabilities(logits[:, 0])
        codes = self._draw(first, uniforms[0]) if primary is None else primary
        conditioned = logits[:, 1] + (0 if self._columns is None else self._columns[codes])
        second = self._probabilities(_finite(conditioned))
        seconds = self._draw(second, uniforms[1]) if secondary is None else secondary
        return Choice(np.stack([codes, seconds], axis=1), np.stack([first, second], axis=1))

    def _probabilities(self, logits: Probabilities) -> Probabilities:
        """Softmax over (B, C); one-hot at the largest logit when greedy."""
        if self._temperature == 0:
            greedy: Probabilities = np.eye(logits.shape[1])[logits.argmax(axis=1)]
            return greedy
        scaled = (logits - logits.max(axis=1, keepdims=True)) / self._temperature
        weights = np.exp(scaled)
        result: Probabilities = weights / weights.sum(axis=1, keepdims=True)
        return result

    def _draw(self, probabilities: Probabilities, uniform: Probabilities) -> Codes:
        """Invert the cumulative distribution of every row (B, C) at `uniform` (B,) in [0, 1)."""
        cumulative = probabilities.cumsum(axis=1)
        # The sum may round to below 1: scaling keeps every draw inside the last code.
        codes: Codes = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=1)
        return codes


def _finite(logits: Probabilities) -> Probabilities:
    # An arg-max or a search in NaN finds code 0, which is a perfectly valid one.
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            "the code logits are not finite, so no code is chosen from them; check the camera and "
            "the state, and export with --fp32 if this is an FP16 bundle"
        )
    return logits
