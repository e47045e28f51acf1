"""What samples allow to say."""

import numpy as np
import pytest
import scipy.stats
from vqbet_bench.samples import SAMPLES_NEEDED, deadline_misses, summarize


@pytest.mark.parametrize(("percentile", "needed"), SAMPLES_NEEDED.items())
def test_a_percentile_is_named_from_the_first_count_that_holds_it(
    percentile: float, needed: int
) -> None:
    """At most one sample beyond the true percentile has a chance under 1 %, and not earlier."""
    beyond = 1 - percentile / 100
    assert scipy.stats.binom.cdf(1, needed, beyond) <= 0.01
    assert scipy.stats.binom.cdf(1, needed - 1, beyond) > 0.01
    samples = np.random.default_rng(0).lognormal(size=needed)
    summary, fewer = summarize(list(samples)), summarize(list(samples[1:]))
    assert summary.percentiles[f"p{percentile:g}"] == np.percentile(samples, percentile)
    assert f"p{percentile:g}" not in fewer.percentiles
    assert (summary.count, summary.worst) == (needed, samples.max())


def test_no_samples_have_no_summary() -> None:
    assert summarize([]) is None


def test_a_deadline_is_missed_by_coming_after_the_next_tick() -> None:
    assert deadline_misses([0.01, 0.02, 0.020001, 0.5], 0.02) == 2
