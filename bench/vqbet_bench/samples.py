"""What a set of latency samples allows to say."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

# Least number of samples before a percentile is named: from there on, the chance that at most one
# sample lies beyond the true percentile is under 1 %. It is how MLPerf Inference comes to 64
# queries for the 90th and 662 for the 99th percentile.
SAMPLES_NEEDED = {50.0: 11, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}


class Summary(Struct, frozen=True):
    """Seconds of one kind of step.

    Attributes:
        count: how many samples.
        mean, worst, std: of all samples.
        iqr: 75th minus 25th percentile.
        percentiles: "p50", "p90", ...: only those that so many samples can name.
    """

    count: int
    mean: float
    worst: float
    std: float
    iqr: float
    percentiles: dict[str, float]


def summarize(samples: Sequence[float]) -> Summary | None:
    """Sum up samples; None when there are none."""
    if not len(samples):
        return None
    values = np.asarray(samples)
    low, high = np.percentile(values, [25, 75])
    named = {f"p{q:g}": q for q, needed in SAMPLES_NEEDED.items() if len(values) >= needed}
    return Summary(
        count=len(values),
        mean=float(values.mean()),
        worst=float(values.max()),
        std=float(values.std()),
        iqr=float(high - low),
        percentiles={name: float(np.percentile(values, q)) for name, q in named.items()},
    )


def deadline_misses(responses: Sequence[float], period: float) -> int:
    """How many actions came after the next tick of the control loop."""
    return sum(response > period for response in responses)
