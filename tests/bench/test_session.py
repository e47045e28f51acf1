"""Policies in processes of their own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vqbet_bench.observations import create_observations
from vqbet_bench.policies import Job
from vqbet_bench.session import PolicyError, Session, Worker, compare
from vqbet_bench.timing import RoundPlan
from vqbet_bench.worker import Measured, Predictions
from workshop import Exported

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.bundle import Bundle


@pytest.fixture
def job(tiny: Exported) -> Job:
    bundle = Bundle.open(tiny.bundle)
    policy = bundle.manifest.policy
    return Job(
        "bundle",
        str(tiny.bundle.absolute()),
        create_observations(bundle, None),
        policy.action_chunk_size,
        policy.n_obs_steps,
        1,
        "onnxruntime",
    )


@pytest.fixture
def worker(job: Job, tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(job, tmp_path / "log")
    yield worker
    worker.close()


def test_a_workers_predictions_are_those_of_the_policy(job: Job, worker: Worker) -> None:
    found = worker.ask(Measured.predictions)
    policy, random = EdgePolicy.load(job.path, "onnxruntime"), np.random.default_rng(0)
    size = policy.manifest.policy.vqvae_n_embed
    for step in range(3):
        pair = random.integers(size, size=2)
        policy.act_chunk(job.observations[step], codes=pair)
        np.testing.assert_array_equal(
            found.actions[step], policy.last.decoded_chunk + policy.last.offset_chunk
        )
    assert len(found.actions) == len(job.observations)


def test_nothing_is_imported_from_where_the_user_stands(job: Job, cwd: Path) -> None:
    for module in ("numpy", "multiprocessing", "vqbet_bench"):
        (cwd / f"{module}.py").write_text("raise SystemExit(7)")
    Worker(job, cwd / "log").close()


def test_a_policy_that_cannot_be_loaded_says_why(job: Job, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(PolicyError, match="is not a bundle"):
        Worker(replace(job, path=str(tmp_path / "missing")), tmp_path / "log")


def test_a_process_that_ends_is_named_with_what_it_printed(worker: Worker, tmp_path: Path) -> None:
    worker._process.kill()
    worker._process.wait()
    (tmp_path / "log").write_text("last words")
    with pytest.raises(PolicyError, match="exit code -9: last words"):
        worker.ask(Measured.predictions)


def test_one_that_fails_drops_out_and_the_others_go_on(job: Job, tmp_path: Path) -> None:
    session = Session(tmp_path, lambda _: None)
    session.start("stays", job)
    session.start("leaves", job)
    session._workers["leaves"]._process.kill()
    (result,) = session.run([RoundPlan("back_to_back", 0.01, 2, 30.0)], rounds=2)
    session.close()
    assert result.name == "stays"
    assert len(result.rounds["back_to_back"]) == 2
    assert "exit code" in session.failures["leaves"]


def test_predictions_are_compared_with_the_first_bundles() -> None:
    actions, codes = np.zeros((4, 5, 2), np.float32), np.zeros((4, 2), np.int64)
    other_actions, other_codes = actions.copy(), codes.copy()
    other_actions[1, 2, 0] = -0.02
    other_codes[3, 1] = 1
    found = compare(
        {
            "peer": None,
            "first": Predictions("one", actions, codes),
            "second": Predictions("one", other_actions, other_codes),
            "of another checkpoint": Predictions("two", actions, codes),
        }
    )
    assert list(found) == ["first", "second"]
    assert found["first"].max_action_error == 0
    # Normalised actions are in -1..1.
    assert found["second"].max_action_error == pytest.approx(0.01)
    assert found["second"].code_agreement == 0.75
