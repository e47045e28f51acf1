"""What a set of latency samples allows to say."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Least number of samples before a percentile is named: from there on, the chance that at most one
# sample lies beyond the true percentile is under 1 %. It is how MLPerf Inference comes to 64
# queries for the 90th and 662 for the 99th percentile.
SAMPLES_NEEDED = {50.0: 11, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}


@dataclass(frozen=True)
class Summary:
    """Seconds of one kind of step.

    Attributes:
        count: how many samples.
        worst: of all samples.
        percentiles: "p50", "p90", ...: only those that so many samples can name.
    """

    count: int
    worst: float
    percentiles: dict[str, float]


def summarize(samples: Sequence[float]) -> Summary | None:
    """Sum up samples; None when there are none."""
    if not len(samples):
        return None
    named = [q for q, needed in SAMPLES_NEEDED.items() if len(samples) >= needed]
    percentiles = {f"p{q:g}": float(np.percentile(samples, q)) for q in named}
    return Summary(len(samples), float(max(samples)), percentiles)


def deadline_misses(responses: Sequence[float], period: float) -> int:
    """How many actions came after the next tick of the control loop."""
    return sum(response > period for response in responses)
