"""The sampler draws from the softmax, reproducibly."""

import subprocess
import sys
from typing import Any

import numpy as np
import oracle
import pytest
from scipy.stats import chisquare
from workshop import Exported, Workshop

from vqbet_edge import EdgePolicy, NonFiniteError, UsageError
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


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("columns", [None, COLUMNS], ids=["joint", "sequential"])
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
    expected = [softmax(layer.astype(float) / TRAINED) for layer in LOGITS]
    np.testing.assert_allclose(choice.probabilities, expected, rtol=1e-12)


def test_greedy_tells_logits_apart_that_the_softmax_does_not() -> None:
    near = np.array([[0.0, 1e-30, -1e-30], [-1e-30, 0.0, 1e-30]], np.float32)
    assert sampler(0).choose(outputs(near)).codes.tolist() == [1, 2]


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0, 0.1])
def test_non_finite_logits_are_never_a_choice(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[1, 3] = value
    with pytest.raises(NonFiniteError):
        sampler(temperature).choose(outputs(logits))


ACT = """
import sys, numpy as np
from vqbet_edge import EdgePolicy
policy = EdgePolicy.load(sys.argv[1], seed=int(sys.argv[2]), temperature=1.0)
frames = np.random.default_rng(0).integers(0, 256, (30, 40, 48, 3), np.uint8)
actions = [policy.act({"observation.image": f, "observation.state": np.full(2, 9, np.float32)})
           for f in frames]
sys.stdout.write(np.array(actions).tobytes().hex())
"""


def run(bundle: Any, seed: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ACT, str(bundle), str(seed)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_same_seed_gives_the_same_actions_in_a_new_process(tiny: Exported) -> None:
    assert run(tiny.bundle, 7) == run(tiny.bundle, 7) != run(tiny.bundle, 8)


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


def test_non_finite_columns_are_never_a_choice() -> None:
    with pytest.raises(NonFiniteError):
        sampler(0.1, np.full((5, 5), np.nan, np.float32)).choose(outputs(LOGITS))


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), "0.5"])
def test_impossible_temperature_is_refused(tiny: Exported, temperature: Any) -> None:
    with pytest.raises(UsageError, match=r"expected a temperature of 0 \(greedy\) or more"):
        EdgePolicy.load(tiny.bundle, temperature=temperature)
