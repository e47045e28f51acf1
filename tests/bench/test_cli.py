"""The command, from its arguments to its files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import oracle
import pytest
from vqbet_bench.results import Report
from workshop import Exported

QUICK = ["--seconds", "0.01", "--rounds", "1", "--rate", "2000", "--threads", "1"]


def bench(*arguments: Any, cwd: Path, **environment: str) -> Any:
    code = "from vqbet_bench.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


@pytest.mark.extended
@pytest.mark.parametrize("peer", [False, True])
def test_a_bundle_alone_and_beside_lerobot(tiny: Exported, cwd: Path, peer: bool) -> None:
    options = ["--backend", "onnxruntime", "tensorrt", "-o", "out"]
    if peer:
        oracle.lerobot("policies.vqbet.modeling_vqbet")
        options += ["--checkpoint", str(tiny.checkpoint)]
    done = bench(tiny.bundle, *QUICK, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((cwd / "out/result.json").read_bytes(), type=Report)
    *lerobot, bundle = report.results
    assert [result.kind for result in report.results] == ["lerobot"] * peer + ["bundle"]
    assert report.baseline == report.results[0]
    # TensorRT is not installed here: it is named with the reason, and the others are measured.
    assert [name for name in report.failures if "tensorrt" in name]
    for result in report.results:
        assert len(result.samples("back_to_back", "replan")) >= 64
        assert len(result.samples("paced", "replan")) >= 64
        assert result.samples("every", "queue") == []
        assert result.memory.resident > 10_000_000
        assert result.start_up > result.load > 0
    # One more robot brings a window, not the weights.
    assert 0 <= bundle.memory.sibling < bundle.memory.resident / 4
    assert bundle.stage_medians()["gpt"] > 0
    assert bundle.bundle_bytes > 10_000
    assert all(result.bundle_bytes is None for result in lerobot)
    assert "tiny-fp32 onnxruntime" in (cwd / "out/report.md").read_text()
    assert "Step that predicts a chunk" in done.stdout


def test_beside_its_own_recording_as_json_and_torch_is_never_loaded(
    tiny: Exported, cwd: Path
) -> None:
    """A robot has no torch: here one that cannot be imported stands in for it."""
    blocked, disk = cwd / "blocked", cwd / "disk"
    blocked.mkdir()
    disk.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('no torch on a robot')\n")
    path = os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")])
    done = bench(tiny.bundle, *QUICK, "--json", "--record", disk, cwd=cwd, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [r["name"] for r in results] == ["tiny-fp32 auto", "tiny-fp32 auto recorded"]
    assert {mode for result in results for mode in result["rounds"]} == {"paced"}
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "bundle"),
        (["missing.bundle"], 4, "is not a bundle"),
        (["missing.bundle", "--rounds", "0"], 2, "--rounds"),
        (["missing.bundle", "--record", "nowhere"], 2, "takes a folder that exists"),
        (["missing.bundle", "--threads", "100000"], 2, "--threads"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], code: int, words: str, monkeypatch: Any, capsys: Any
) -> None:
    from vqbet_bench.cli import main

    monkeypatch.setattr(sys, "argv", ["vqbet-bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    assert words in capsys.readouterr().err
