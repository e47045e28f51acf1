"""`vqbet-export` as a person runs it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from command import run
from safetensors.torch import load_file, save_file
from vqbet_export import cli
from workshop import Workshop

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime import comparison
from vqbet_edge.training.dataset import LeRobotDataset

PUSHT = Path(__file__).parents[1] / "data" / "pusht"


@pytest.fixture(scope="module")
def pusht_checkpoint(workshop: Workshop) -> Path:
    """An untrained policy with PushT's features."""
    return workshop.checkpoint(oracle.small("pusht"))


def test_exports_next_to_where_one_stands(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, pusht_checkpoint: Path
) -> None:
    arguments = [str(pusht_checkpoint / "model.safetensors"), "--fp16", "--verify-steps", "16"]
    assert run(monkeypatch, *arguments, "--verify-data", str(PUSHT), "--json") == 0
    bundle = cwd / "pusht-fp16.bundle"
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((bundle / "report.json").read_text())
    assert [result["observations"] for result in report["results"]] == ["random", "real"]
    assert [result["samples"] for result in report["results"]] == [16, 16]
    markdown = (bundle / "report.md").read_text()
    assert "## On 16 real observations" in markdown
    assert "| vision_encoder |" in markdown
    policy = EdgePolicy.load(bundle)
    assert {stage.precision for stage in policy.manifest.stages.values()} == {"fp16"}
    episode = LeRobotDataset.open(PUSHT).episode(0)
    for step in range(8):
        frame, state = episode["observation.image"][step], episode["observation.state"][step]
        action = policy.act({"observation.image": frame, "observation.state": state})
        assert np.isfinite(action).all()


def test_existing_bundle_needs_force(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, pusht_checkpoint: Path
) -> None:
    arguments = [str(pusht_checkpoint), "-o", "a.bundle", "--verify-steps", "2"]
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments) == 2
    assert "replace it with --force" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--force") == 0
    (cwd / "folder").mkdir()
    assert run(monkeypatch, str(pusht_checkpoint), "-o", "folder", "--force") == 2
    assert "is no bundle" in capsys.readouterr().err


def test_failed_verification_publishes_nothing_and_exits_3(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, pusht_checkpoint: Path
) -> None:
    strict = replace(comparison.LIMITS["fp16"], relative_error=1e-6)
    monkeypatch.setitem(comparison.LIMITS, "fp16", strict)
    arguments = [str(pusht_checkpoint), "--fp16", "-o", "a.bundle", "--verify-steps", "2"]
    assert run(monkeypatch, *arguments) == 3
    assert "nothing was published: " in capsys.readouterr().err
    assert list(cwd.iterdir()) == []


def test_overflow_in_float16_is_a_failed_verification(
    workshop: Workshop, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = workshop.checkpoint(oracle.TINY)
    checkpoint = shutil.copytree(source, cwd / "policy")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["vqbet.policy.transformer.h.0.mlp.2.bias"].fill_(1e5)
    save_file(tensors, checkpoint / "model.safetensors")
    arguments = [str(checkpoint), "--fp16", "-o", "a.bundle", "--verify-steps", "2"]
    assert run(monkeypatch, *arguments) == 3
    assert "the fp16 graphs overflow, nothing was published" in capsys.readouterr().err
    assert not (cwd / "a.bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 4, "'nowhere' does not exist"),
        (["nowhere", "--verify-steps", "0"], 2, "--verify-steps must be at least 1"),
        (["policy.pt"], 4, "'policy.pt' does not exist"),
        (["nowhere", "--int8", "--fp16"], 2, "--fp16 and --int8 exclude each other"),
        (["nowhere", "--fp16", "--calibration-data", "x"], 2, "--calibration-data is for --int8"),
        (["nowhere", "--int8"], 2, "Random numbers"),
    ],
)
@pytest.mark.usefixtures("cwd")
def test_mistakes_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], code: int, message: str
) -> None:
    assert run(monkeypatch, *arguments) == code
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("cwd")
def test_verification_data_must_fit_the_policy(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    checkpoint = workshop.checkpoint(oracle.TINY)
    assert run(monkeypatch, str(checkpoint), "--verify-data", str(PUSHT)) == 4
    assert "the policy observes 'observation.image' of shape (40, 48, 3)" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("outputs/pusht/checkpoints/last/pretrained_model", "pusht-fp32.bundle"),
        (
            "outputs/pusht/checkpoints/000100/pretrained_model/model.safetensors",
            "pusht-fp32.bundle",
        ),
        ("policies/mine/model.safetensors", "mine-fp32.bundle"),
        ("someone/vqbet_pusht", "vqbet_pusht-fp32.bundle"),
        ("someone/policy-v0.1", "policy-v0.1-fp32.bundle"),
    ],
)
def test_bundle_is_named_after_the_policy(source: str, name: str) -> None:
    assert cli.default_output(source, "fp32") == Path(name)
