"""Policies in processes of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vqbet_bench.observations import create_observations
from vqbet_bench.policies import Job
from vqbet_bench.session import PolicyError, Session, Worker
from vqbet_bench.timing import RoundPlan
from vqbet_bench.worker import Measured
from workshop import Exported

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
        worker.ask(Measured.memory)


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
