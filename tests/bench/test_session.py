"""Policies in processes of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
from vqbet_bench.observations import create_observations
from vqbet_bench.policies import Job
from vqbet_bench.session import Policies, PolicyError, Worker
from vqbet_bench.timing import RoundPlan
from workshop import Exported

from vqbet_edge.runtime.bundle import Bundle


@pytest.fixture
def job(tiny: Exported) -> Job:
    bundle = Bundle.open(tiny.bundle)
    chunk = bundle.manifest.policy.action_chunk_size
    path = str(tiny.bundle.absolute())
    return Job("bundle", path, create_observations(bundle, None), chunk, 1, "onnxruntime")


def test_a_policy_that_cannot_be_loaded_says_why(job: Job, cwd: Path) -> None:
    """And its process imports nothing from where the user stands."""
    for module in ("numpy", "multiprocessing", "vqbet_bench"):
        (cwd / f"{module}.py").write_text("raise SystemExit(7)")
    with pytest.raises(PolicyError, match="is not a bundle"):
        Worker(replace(job, path=str(cwd / "missing")), cwd / "log")


def test_one_that_ends_drops_out_with_what_it_printed_and_the_others_go_on(
    job: Job, tmp_path: Path
) -> None:
    policies = Policies(tmp_path, lambda _: None)
    policies.start("stays", job)
    policies.start("leaves", job)
    process = policies._workers["leaves"]._process
    process.kill()
    process.wait()
    (tmp_path / "1.log").write_text("last words")
    (result,) = policies.run([RoundPlan("back_to_back", 0.01, 2, 30.0)], rounds=2)
    policies.close()
    assert result.name == "stays"
    assert len(result.rounds["back_to_back"]) == 2
    assert "exit code -9: last words" in policies.failures["leaves"]
