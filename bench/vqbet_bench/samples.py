"""What a set of latency samples allows to say."""

from collections.abc import Sequence

import numpy as np

# Least number of samples before a percentile is named: from there on, the chance that at most one
# sample lies beyond the true percentile is under 1 %. It is how MLPerf Inference comes to 64
# queries for the 90th and 662 for the 99th percentile.
SAMPLES_NEEDED = {50.0: 11, 90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}


def summarize(samples: Sequence[float]) -> dict[str, float]:
    """`p50`, `p90`, ..., those that so many samples can name, and `worst`; empty without any."""
    if not len(samples):
        return {}
    named = [q for q, needed in SAMPLES_NEEDED.items() if len(samples) >= needed]
    return {f"p{q:g}": float(np.percentile(samples, q)) for q in named} | {"worst": max(samples)}
