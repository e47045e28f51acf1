"""What samples allow to say."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
from vqbet_bench.samples import SAMPLES_NEEDED, deadline_misses, summarize


@pytest.mark.parametrize(("percentile", "needed"), SAMPLES_NEEDED.items())
def test_a_percentile_is_named_from_the_first_count_that_holds_it(
    percentile: Any, needed: Any
) -> None:
    """At most one sample beyond the true percentile has a chance under 1 %, and not earlier."""
    beyond = 1 - percentile / 100
    assert scipy.stats.binom.cdf(1, needed, beyond) <= 0.01
    assert scipy.stats.binom.cdf(1, needed - 1, beyond) > 0.01


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, []),
        (10, []),
        (63, ["p50"]),
        (64, ["p50", "p90"]),
        (661, ["p50", "p90", "p95"]),
        (662, ["p50", "p90", "p95", "p99"]),
        (6636, ["p50", "p90", "p95", "p99", "p99.9"]),
    ],
)
def test_percentiles_that_too_few_samples_cannot_name_are_left_out(count: Any, names: Any) -> None:
    assert list(summarize(np.arange(count)).percentiles) == names


def test_a_summary_says_what_numpy_says() -> None:
    samples = np.random.default_rng(0).lognormal(size=1000)
    summary = summarize(list(samples))
    assert summary.count == 1000
    assert summary.percentiles["p99"] == np.percentile(samples, 99)
    assert summary.worst == samples.max()


def test_no_samples_have_no_summary() -> None:
    assert summarize([]) is None


def test_a_deadline_is_missed_by_coming_after_the_next_tick() -> None:
    assert deadline_misses([0.01, 0.02, 0.020001, 0.5], 0.02) == 2
