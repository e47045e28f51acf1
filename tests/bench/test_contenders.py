"""Every peer computes the same policy, or comparing times would mean nothing."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from vqbet_bench.contenders import LeRobot, Network, SingleGraph
from vqbet_bench.messages import Job
from vqbet_bench.observations import Pool, create_pool
from vqbet_bench.whole_policy import export_single_graph
from vqbet_bench.worker import count_allocations
from workshop import Exported

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.bundle import Bundle

STEPS = 12


@pytest.fixture(scope="module")
def pool(tiny: Exported) -> Any:
    return create_pool(Bundle.open(tiny.bundle), None)


@pytest.fixture(scope="module")
def greedy(tiny: Exported, pool: Pool) -> Any:
    """Actions of the bundle for the first observations, with the most probable codes."""
    policy = EdgePolicy.load(tiny.bundle, "onnxruntime", temperature=0)
    return [policy.act(pool.observation(step)).copy() for step in range(STEPS)]


def job(tiny: Exported, kind: Any, path: Any) -> Any:
    manifest = Bundle.open(tiny.bundle).manifest
    policy = manifest.policy
    return Job(kind, str(path), "", policy.action_chunk_size, policy.n_obs_steps, 1)


def test_the_whole_network_and_its_single_graph_act_as_the_bundle(
    tiny: Exported, pool: Pool, greedy: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "single.onnx"
    export_single_graph(str(tiny.checkpoint), str(path))
    for contender in (
        Network(job(tiny, "network", tiny.checkpoint), pool),
        SingleGraph(job(tiny, "single-graph", path), pool),
    ):
        contender.start(every=False)
        actions = [contender.act(contender.prepare(step)) for step in range(STEPS)]
        np.testing.assert_allclose(actions, greedy, rtol=1e-4, atol=1e-2)


def test_lerobot_gets_the_observations_that_the_bundle_gets(
    tiny: Exported, pool: Pool, greedy: list[Any]
) -> None:
    oracle.lerobot("policies.vqbet.modeling_vqbet")
    contender = LeRobot(job(tiny, "lerobot", tiny.checkpoint), pool)
    contender.start(every=False)
    stats = oracle.make_statistics(tiny.case)["action"]
    low, high = stats["min"].numpy(), stats["max"].numpy()

    def most_probable(weights: Any, num_samples: Any) -> Any:
        assert num_samples == 1
        return weights.argmax(dim=-1, keepdim=True)

    with mock.patch.object(torch, "multinomial", most_probable):
        normalized = [contender.act(contender.prepare(step))[0].numpy() for step in range(STEPS)]
    actions = (np.array(normalized) + 1) / 2 * (high - low) + low
    np.testing.assert_allclose(actions, greedy, rtol=1e-4, atol=1e-2)


def test_lerobot_plans_on_every_step_when_asked(tiny: Exported, pool: Pool) -> None:
    oracle.lerobot("policies.vqbet.modeling_vqbet")
    contender = LeRobot(job(tiny, "lerobot", tiny.checkpoint), pool)
    for every, expected in ((False, 2), (True, STEPS - 2)):
        contender.start(every=every)
        with mock.patch.object(
            contender._policy, "predict_action_chunk", wraps=contender._policy.predict_action_chunk
        ) as predict:
            for step in range(STEPS - 2):
                contender.act(contender.prepare(step))
        assert predict.call_count == expected


def test_random_observations_vary_are_seeded_and_within_the_policys_range(tiny: Exported) -> None:
    bundle = Bundle.open(tiny.bundle)
    first, again = create_pool(bundle, None), create_pool(bundle, None)
    assert np.array_equal(first.states, again.states)
    assert len(np.unique(first.states, axis=0)) == len(first.states)
    assert np.abs(first.normalized_states).max() <= 1.001


def test_a_pool_survives_its_file(pool: Pool, tmp_path: Path) -> None:
    pool.save(tmp_path / "pool.npz")
    loaded = Pool.load(str(tmp_path / "pool.npz"))
    assert loaded.state_key == pool.state_key
    for key, value in pool.observation(3).items():
        assert np.array_equal(loaded.observation(3)[key], value)
    assert loaded.size == pool.size


def test_a_data_set_of_another_robot_is_refused(tiny: Exported) -> None:
    with pytest.raises(DatasetError, match="observes images"):
        create_pool(Bundle.open(tiny.bundle), "tests/data/pusht")


class Hoarder:
    """Keeps `kept` bytes of every call and holds `held` for its duration."""

    chunk = 5

    def __init__(self, kept: Any, held: Any) -> None:
        self.kept, self.held, self.hoard = kept, held, []

    def start(self, *, every: Any) -> None:
        assert not every

    def prepare(self, _step: Any) -> Any:
        return np.zeros(10_000)  # the observation is not the policy's allocation

    def act(self, _observation: Any) -> None:
        temporary = bytes(self.held)
        if self.kept:
            self.hoard.append(bytes(self.kept))
        del temporary


@pytest.mark.parametrize("kept", [0, 1000])
def test_allocations_are_counted(kept: Any) -> None:
    counted = count_allocations(Hoarder(kept, 50_000), 200)
    assert counted.net / counted.calls == pytest.approx(kept, rel=0.1, abs=5)
    assert counted.largest == pytest.approx(50_000 + kept, rel=0.05)
