"""What values a tensor takes, and the range that eight bits should cover."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vqbet_calibration.graphs import Session, with_outputs

Array = NDArray[Any]
Feed = Mapping[str, Array]
Method = Literal["min-max", "percentile", "entropy"]

METHODS: tuple[Method, ...] = ("min-max", "percentile", "entropy")
BINS = 2048
# Share of the values that the range covers; of a million, ten are clipped.
PERCENTILE = 0.99999
# Levels of a signed 8-bit magnitude, as in TensorRT's entropy calibration.
_LEVELS = 128


@dataclass(frozen=True)
class Range:
    """The values that eight bits cover; contains 0."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The largest absolute value, for symmetric quantisation."""
        return max(-self.low, self.high)


@dataclass(frozen=True)
class Histogram:
    """Values of one tensor over all calibration samples.

    Attributes:
        counts: int64 (BINS,), evenly from `low` to `high`.
        low, high: smallest and largest value, at most and at least 0.
    """

    counts: NDArray[np.int64]
    low: float
    high: float

    def range(self, method: Method) -> Range:
        """The range to cover, by one of `METHODS`."""
        match method:
            case "min-max":
                return Range(self.low, self.high)
            case "percentile":
                limit = self._percentile()
            case "entropy":
                limit = self._least_divergence()
        return Range(max(self.low, -limit), min(self.high, limit))

    def _magnitudes(self) -> tuple[NDArray[np.float64], float]:
        """Histogram of absolute values, and its upper end; exact zeros cost no precision."""
        end = max(-self.low, self.high)
        edges = np.linspace(self.low, self.high, BINS + 1)
        centers = (edges[:-1] + edges[1:]) / 2
        counts, _ = np.histogram(np.abs(centers), BINS, (0, end), weights=self.counts)
        return counts, end

    def _percentile(self) -> float:
        counts, end = self._magnitudes()
        covered = np.cumsum(counts) / max(counts.sum(), 1)
        return float(end * (np.searchsorted(covered, PERCENTILE) + 1) / BINS)

    def _least_divergence(self) -> float:
        """The limit whose quantised distribution is closest to the true one.

        Kullback-Leibler divergence over candidates of growing width, as in Migacz, "8-bit
        inference with TensorRT" (GTC 2017).
        """
        counts, end = self._magnitudes()
        widths = range(_LEVELS, BINS + 1, _LEVELS // 8)
        divergences = [_divergence(counts, width) for width in widths]
        return float(end * widths[int(np.argmin(divergences))] / BINS)


def _divergence(counts: NDArray[np.float64], width: int) -> float:
    """Between `counts` clipped to the first `width` bins and the same in `_LEVELS` levels."""
    true = counts[:width].copy()
    filled = true > 0
    level = np.arange(width) * _LEVELS // width
    mass = np.bincount(level, true, _LEVELS)
    share = mass / np.maximum(np.bincount(level, filled, _LEVELS), 1)
    quantized = np.where(filled, share[level], 0)
    true[-1] += counts[width:].sum()
    if not quantized.any() or (true[-1] > 0 and not filled[-1]):
        return float("inf")  # what is clipped would have no probability at all
    p, q = true / true.sum(), quantized / quantized.sum()
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())


def collect(graph: bytes, feeds: Sequence[Feed], tensors: Iterable[str]) -> dict[str, Histogram]:
    """Run a graph over calibration samples and look at some of its tensors.

    Two passes, so that memory does not grow with the samples: extremes, then counts.

    Args:
        graph: floating-point ONNX.
        feeds: inputs by name, one entry per run.
        tensors: names of tensors within the graph.
    """
    names = sorted(set(tensors))
    session = Session(with_outputs(graph, names), names)
    low, high = np.zeros(len(names)), np.zeros(len(names))
    for feed in feeds:
        values = session.run(feed)
        low = np.minimum(low, [v.min() for v in values])
        high = np.maximum(high, [v.max() for v in values])
    counts = np.zeros((len(names), BINS), np.int64)
    for feed in feeds:
        for i, value in enumerate(session.run(feed)):
            nonzero = value[value != 0]
            counts[i] += np.histogram(nonzero, BINS, (low[i], high[i]))[0]
    found = zip(names, counts, low.tolist(), high.tolist(), strict=True)
    return {name: Histogram(row, smallest, largest) for name, row, smallest, largest in found}
