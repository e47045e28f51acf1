"""The doctor on machines that are not there: their files lie in a temporary directory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vqbet_engines.doctor import Finding, Machine, examine

from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE


def write(root: Path, **files: str) -> Machine:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_minus_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root)


def orin_nano(root: Path, release: str = "# R36 (release), REVISION: 4.3, GCID: 1") -> Machine:
    return write(
        root,
        etc__nv_tegra_release=release + ", BOARD: generic, EABI: aarch64\n",
        proc__device_minus_tree__model="NVIDIA Jetson Orin Nano Developer Kit\0",
        proc__meminfo="MemTotal:        7802744 kB\nMemFree: 1 kB\n",
        sys__class__devfreq__gpu__min_freq="306000000\n",
        sys__class__devfreq__gpu__max_freq="624750000\n",
    )


def find(machine: Machine, name: str) -> Finding:
    (finding,) = [finding for finding in examine(machine) if finding.name == name]
    return finding


def test_an_orin_nano(tmp_path: Path) -> None:
    machine = orin_nano(tmp_path)
    assert find(machine, "board").value.endswith("profile: orin-nano")
    assert find(machine, "JetPack") == Finding("JetPack", "ok", "6.2 (Jetson Linux 36.4.3)")


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [("# R36 (release), REVISION: 3.0", "6.0"), ("# R36 (release), REVISION: 4.0", "6.1"),
     ("# R38 (release), REVISION: 2.1", "7.0"), ("# R38 (release), REVISION: 4.0", "7.1"),
     ("# R39 (release), REVISION: 2.0", "7.2")],
)  # fmt: skip
def test_jetson_linux_tells_jetpack(tmp_path: Path, release: str, jetpack: str) -> None:
    assert find(orin_nano(tmp_path, release), "JetPack").value.startswith(jetpack)


def test_a_jetpack_that_is_too_old(tmp_path: Path) -> None:
    finding = find(orin_nano(tmp_path, "# R35 (release), REVISION: 4.1"), "JetPack")
    assert finding.state == "problem"
    assert "SDK Manager" in finding.mend


def test_clocks_that_are_not_pinned(tmp_path: Path) -> None:
    machine = orin_nano(tmp_path)
    assert find(machine, "GPU clock") == Finding(
        "GPU clock", "note", "306 to 624 MHz", "sudo jetson_clocks"
    )
    (tmp_path / "sys/class/devfreq/gpu/min_freq").write_text("624750000\n")
    assert find(machine, "GPU clock").state == "ok"


def test_no_jetson(tmp_path: Path) -> None:
    names = [finding.name for finding in examine(Machine(tmp_path))]
    assert "power mode" not in names
    assert "GPU clock" not in names
    assert find(Machine(tmp_path), "board").value.endswith("no Jetson")


@pytest.mark.parametrize("missing", ["onnxruntime", "tensorrt"])
def test_a_missing_package_comes_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in (missing, "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    label = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}[missing]
    elsewhere, jetson = find(Machine(tmp_path), label), find(orin_nano(tmp_path), label)
    assert elsewhere.mend.startswith("pip install")
    assert {elsewhere.state, jetson.state} == {"note", "problem"}


def test_every_problem_has_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    problems = [f for f in examine(orin_nano(tmp_path)) if f.state == "problem"]
    assert {"TensorRT", "CUDA"} <= {finding.name for finding in problems}
    assert all(finding.mend for finding in problems if finding.name != "CUDA")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    code = "from vqbet_engines.doctor import main; main()"
    command = [sys.executable, "-c", code, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    findings = json.loads(done.stdout)
    assert {"board", "Python", "numpy", "ONNX Runtime"} <= {f["name"] for f in findings}
    problems = any(finding["state"] == "problem" for finding in findings)
    assert done.returncode == (6 if problems else 0)
