"""The command, from its arguments to its files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vqbet_bench.results import Report
from workshop import Exported

QUICK = ["--seconds", "0.01", "--rounds", "1", "--rate", "2000"]


def bench(*arguments: Any, cwd: Path) -> Any:
    code = "from vqbet_bench.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


def test_a_bundle_beside_a_peer(tiny: Exported, cwd: Path) -> None:
    done = bench(
        tiny.bundle, *QUICK, "--checkpoint", tiny.checkpoint, "--peers", "single-graph",
        "--backend", "onnxruntime", "tensorrt", "--threads", "1", "-o", "out", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((cwd / "out/result.json").read_bytes(), type=Report)
    bundle, peer = sorted(report.results, key=lambda result: result.kind)
    assert (bundle.kind, peer.kind) == ("bundle", "single-graph")
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
    code = "from vqbet_bench.cli import main; main()"
    path = os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(tiny.bundle),
            *QUICK,
            "--threads",
            "1",
            "--json",
            "--record",
            str(disk),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [result["name"] for result in report["results"]] == [
        "tiny-fp32 auto",
        "tiny-fp32 auto recorded",
    ]
    assert {mode for result in report["results"] for mode in result["rounds"]} == {"paced"}
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
def test_mistakes_are_explained(arguments: Any, code: Any, words: Any, cwd: Path) -> None:
    done = bench(*arguments, cwd=cwd)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
