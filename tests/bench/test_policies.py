"""LeRobot computes the same policy, or comparing times would mean nothing."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from vqbet_bench.observations import Observations, create_observations
from vqbet_bench.policies import Job, LeRobot, MeasuredBundle
from workshop import Exported

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.normalization import Affine

STEPS = 12


@pytest.fixture(scope="module")
def observations(tiny: Exported) -> Any:
    return create_observations(Bundle.open(tiny.bundle), None)


@pytest.fixture(scope="module")
def greedy(tiny: Exported, observations: Observations) -> Any:
    """Actions of the bundle for the first observations, with the most probable codes."""
    policy = EdgePolicy.load(tiny.bundle, "onnxruntime", temperature=0)
    return [policy.act(observations[step]).copy() for step in range(STEPS)]


def job(tiny: Exported, kind: Any, path: Any, observations: Observations) -> Job:
    chunk = Bundle.open(tiny.bundle).manifest.policy.action_chunk_size
    return Job(kind, str(path), observations, chunk, 1)


def test_lerobot_gets_what_the_bundle_gets_and_plans_when_asked(
    tiny: Exported, observations: Observations, greedy: list[Any]
) -> None:
    oracle.lerobot("policies.vqbet.modeling_vqbet")
    policy = LeRobot(job(tiny, "lerobot", tiny.checkpoint, observations))
    policy.start(every=False)

    def most_probable(weights: Any, num_samples: Any) -> Any:
        assert num_samples == 1
        return weights.argmax(dim=-1, keepdim=True)

    with mock.patch.object(torch, "multinomial", most_probable):
        actions = [policy.act(policy.prepare(step))[0].numpy() for step in range(STEPS)]
    np.testing.assert_allclose(actions, greedy, rtol=1e-4, atol=1e-2)
    for every, expected in ((False, 2), (True, STEPS - 2)):
        policy.start(every=every)
        with mock.patch.object(
            policy._policy, "predict_action_chunk", wraps=policy._policy.predict_action_chunk
        ) as predict:
            for step in range(STEPS - 2):
                policy.act(policy.prepare(step))
        assert predict.call_count == expected


def test_random_observations_vary_are_seeded_and_within_the_policys_range(tiny: Exported) -> None:
    bundle = Bundle.open(tiny.bundle)
    first, again = create_observations(bundle, None), create_observations(bundle, None)
    assert np.array_equal(first.states, again.states)
    assert len(np.unique(first.states, axis=0)) == len(first.states)
    scaling = Affine.from_arrays(bundle.arrays, "state", bundle.manifest.state_dim)
    assert np.abs(scaling.apply(first.states)).max() <= 1.001


def test_what_a_robot_recorded_is_acted_on(
    tiny: Exported, observations: Observations, tmp_path: Path
) -> None:
    policy = EdgePolicy.load(tiny.bundle, "onnxruntime")
    with policy.record(tmp_path / "seen"):
        for step in range(STEPS):
            policy.act(observations[step])
    found = create_observations(Bundle.open(tiny.bundle), str(tmp_path / "seen"))
    for step in range(len(found)):
        recorded = [np.array_equal(found.states[step], s) for s in observations.states[:STEPS]]
        (row,) = np.flatnonzero(recorded)
        for key, value in found[step].items():
            assert np.array_equal(value, observations[int(row)][key])


def test_a_bundle_predicts_on_every_step_when_asked(
    tiny: Exported, observations: Observations
) -> None:
    policy = MeasuredBundle(job(tiny, "bundle", tiny.bundle, observations))
    for every, expected in ((False, 2), (True, STEPS - 2)):
        policy.start(every=every)
        decisions = []
        for step in range(STEPS - 2):
            policy.act(policy.prepare(step))
            if not decisions or decisions[-1] is not policy._policy.last:
                decisions.append(policy._policy.last)
        assert len(decisions) == expected
