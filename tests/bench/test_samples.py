"""What samples allow to say."""

import numpy as np
import pytest
import scipy.stats
from vqbet_bench.samples import SAMPLES_NEEDED, summarize


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
    assert summary[f"p{percentile:g}"] == np.percentile(samples, percentile)
    assert f"p{percentile:g}" not in fewer
    assert summary["worst"] == samples.max()


def test_no_samples_have_no_summary() -> None:
    assert summarize([]) == {}
