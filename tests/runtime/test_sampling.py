"""The sampler draws from the softmax, reproducibly."""

import numpy as np
import oracle
import pytest
from scipy.stats import chisquare
from workshop import Workshop

from vqbet_edge import EdgePolicy, NonFiniteError
from vqbet_edge.runtime.backends.base import HeadOutputs
from vqbet_edge.runtime.sampling import CodeSampler

DRAWS = 100_000
TRAINED = 0.1
LOGITS = np.array([[0.9, -0.3, 0.1, 0.4, -1.2], [0.2, 0.6, -0.5, 0.0, 0.3]], np.float32)
COLUMNS = np.random.default_rng(5).normal(0, 0.5, (5, 5)).astype(np.float32)


def sampler(temperature: float, columns: np.ndarray | None = None, seed: int = 1) -> CodeSampler:
    return CodeSampler(temperature, TRAINED, columns, seed)


def outputs(logits: np.ndarray) -> HeadOutputs:
    return HeadOutputs(logits, np.zeros((2, logits.shape[1], 1, 1), np.float32))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    result: np.ndarray = weights / weights.sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "columns"),
    [
        (0.5, COLUMNS),
        *(
            pytest.param(t, c, marks=pytest.mark.extended)
            for t, c in ((0.1, None), (1.0, None), (0.1, COLUMNS), (1.0, COLUMNS))
        ),
    ],
)
def test_distribution_is_the_softmax(temperature: float, columns: np.ndarray | None) -> None:
    drawing, given = sampler(temperature, columns), outputs(LOGITS)
    primary = softmax(LOGITS[0].astype(float) / temperature)
    expected = np.stack(
        [
            primary[p]
            * softmax(
                (LOGITS[1] + (0 if columns is None else columns[p])).astype(float) / temperature
            )
            for p in range(5)
        ]
    )
    counts = np.zeros((5, 5))
    for _ in range(DRAWS):
        counts[tuple(drawing.choose(given).codes)] += 1
    # The chi-square approximation wants at least five expected draws a cell; pool the rest.
    common = expected * DRAWS >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * DRAWS
    keep = wanted > 0
    assert chisquare(observed[keep], wanted[keep]).pvalue > 1e-3


def test_greedy_takes_the_largest_logits_and_tells_the_trained_distribution() -> None:
    choice = sampler(0).choose(outputs(LOGITS))
    assert choice.codes.tolist() == [0, 1]
    near = np.array([[0.0, 1e-30, -1e-30], [-1e-30, 0.0, 1e-30]], np.float32)
    assert sampler(0).choose(outputs(near)).codes.tolist() == [1, 2]
    expected = [softmax(layer.astype(float) / TRAINED) for layer in LOGITS]
    np.testing.assert_allclose(choice.probabilities, expected, rtol=1e-12)


def test_forced_codes_do_not_shift_the_sequence() -> None:
    free, forced = (sampler(1.0, seed=3) for _ in range(2))
    first = [free.choose(outputs(LOGITS)).codes for _ in range(20)]
    second = []
    for step in range(20):
        codes = np.array([4, 4]) if step % 2 else None
        second.append(forced.choose(outputs(LOGITS), codes).codes)
    assert (np.array(first)[::2] == np.array(second)[::2]).all()
    assert (np.array(second)[1::2] == 4).all()


def test_extreme_logits_are_no_overflow() -> None:
    logits = np.array([[3e38, -3e38, 0.0], [-1e30, 1e30, 1e30]], np.float32)
    drawing = sampler(0.1)
    choices = [drawing.choose(outputs(logits)) for _ in range(50)]
    assert np.isfinite([choice.probabilities for choice in choices]).all()
    assert {int(choice.codes[0]) for choice in choices} == {0}
    assert {int(choice.codes[1]) for choice in choices} == {1, 2}


@pytest.mark.parametrize(("value", "temperature"), [(np.nan, 0), (np.inf, 0.1), (-np.inf, 0)])
def test_non_finite_logits_are_never_a_choice(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[1, 3] = value
    with pytest.raises(NonFiniteError):
        sampler(temperature).choose(outputs(logits))
    with pytest.raises(NonFiniteError):
        sampler(0.1, np.full((5, 5), value, np.float32)).choose(outputs(LOGITS))


def test_sequential_bundle_samples_its_own_probabilities(workshop: Workshop) -> None:
    """The runtime's secondary distribution is LeRobot's, given the drawn primary code."""
    case = next(case for case in oracle.CASES if case.name == "sequential")
    exported = workshop.bundle(case)
    policy = EdgePolicy.load(exported.bundle, temperature=1.0)
    reference = oracle.ReferencePolicy(workshop.policy(case), case)
    reference.policy.config.bet_softmax_temperature = 1.0
    observation = oracle.observations(case, 1)[0]
    for _ in range(5):
        policy.act_chunk(observation)
        assert policy.last is not None
        reference.policy.reset()
        reference.injected.codes = tuple(policy.last.codes.tolist())
        reference.act(observation)
        change = np.abs(policy.last.code_probabilities - reference.injected.probabilities)
        assert change.max() < 1e-3
    reference.policy.config.bet_softmax_temperature = 0.1
