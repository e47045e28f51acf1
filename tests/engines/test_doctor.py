"""The doctor on machines that are not there: their files lie in a temporary directory."""

import importlib.metadata
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from vqbet_engines.doctor import Finding, Fix, Machine, examine

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE, user_cache


def write(root: Path, **files: str) -> Machine:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_minus_", "-").replace("_dot_", ".")
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
    old = find(orin_nano(tmp_path, "# R36 (release), REVISION: 3.0"), "JetPack")
    assert old.state == "problem"
    assert "opset 20 needs TensorRT 10" in old.value
    assert old.fix
    assert "SDK Manager" in old.fix.command


def test_clocks_that_are_not_pinned(tmp_path: Path) -> None:
    machine = orin_nano(tmp_path)
    assert find(machine, "GPU clock") == Finding(
        "GPU clock", "note", "306 to 624 MHz", Fix("sudo jetson_clocks")
    )
    (tmp_path / "sys/class/devfreq/gpu/min_freq").write_text("624750000\n")
    assert find(machine, "GPU clock").state == "ok"


def test_a_user_who_may_not_use_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's, who is in none of the groups that own the device files."""
    machine = orin_nano(tmp_path)
    write(tmp_path, dev__nvmap="", dev__dri__renderD128="")
    assert "GPU access" not in [finding.name for finding in examine(machine)]
    monkeypatch.setattr("os.access", lambda path, _mode: path.name != "nvmap")
    finding = find(machine, "GPU access")
    assert finding.state == "problem"
    assert "may not open /dev/nvmap" in finding.value
    assert "renderD128" not in finding.value
    assert finding.fix
    assert "usermod -aG video,render" in finding.fix.command


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
    assert elsewhere.fix
    assert elsewhere.fix.command.startswith("pip install")
    assert {elsewhere.state, jetson.state} == {"note", "problem"}


def test_every_problem_has_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    problems = [f for f in examine(orin_nano(tmp_path)) if f.state == "problem"]
    assert {"TensorRT", "CUDA"} <= {finding.name for finding in problems}
    assert all(finding.fix for finding in problems)
    # With JetPack 6 the newest bindings find a driver that is too old for them.
    (cuda,) = [finding for finding in problems if finding.name == "CUDA"]
    assert cuda.fix
    assert cuda.fix.command == "pip install 'cuda-bindings<13'"


CONFIGURATION = (
    "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n"
)
VERBOSE = "NVPM VERB: POWER_MODEL: ID=0 NAME=MAXN\nNVPM VERB: POWER_MODEL: ID=3 NAME=MODE_50W\n"


@pytest.mark.parametrize(
    ("modes", "printed", "current", "command"),
    [(CONFIGURATION + "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n", "", "25W", "sudo nvpmodel -m 2"),
     (CONFIGURATION + "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n", "", "MAXN_SUPER", None),
     ("", VERBOSE, "MODE_50W", "sudo nvpmodel -m 0"),
     ("", VERBOSE, "MAXN", None),
     (CONFIGURATION, "", "15W", "nvpmodel -p --verbose  # lists the modes"),
     ("", "", "MAXN", None),
     ("", "", "15W", "nvpmodel -p --verbose  # lists the modes")],
)  # fmt: skip
def test_the_fastest_power_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modes: str, printed: str, current: str,
    command: str | None,
) -> None:  # fmt: skip
    """Its number is not 0 everywhere, and not every board has one called MAXN."""
    machine = orin_nano(tmp_path)
    write(tmp_path, etc__nvpmodel_dot_conf=modes)
    answers = {("-q",): f"NVPM WARN: fan mode is not set!\nNV Power Mode: {current}\n2\n"}
    monkeypatch.setattr(
        Machine, "output", lambda _machine, _name, *options: answers.get(options, printed)
    )
    finding = find(machine, "power mode")
    assert finding.state == ("ok" if command is None else "note")
    assert (finding.fix and finding.fix.command) == command


def test_onnxruntime_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there; another one beside it would not help."""
    (tmp_path / "onnxruntime.py").write_text(
        "raise ImportError('A module that was compiled using NumPy 1.x cannot be run in NumPy 2')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    finding = find(Machine(tmp_path), "ONNX Runtime")
    assert finding.state == "problem"
    assert "installed but cannot be loaded" in finding.value
    assert finding.fix
    assert finding.fix.command == "pip install 'numpy<2'"


def test_a_cache_that_others_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert find(Machine(tmp_path), "engine cache").state == "ok"
    tmp_path.chmod(0o777)
    finding = find(Machine(tmp_path), "engine cache")
    assert finding.state == "problem"
    assert f"'{tmp_path}' can be written by somebody else" in finding.value
    assert finding.fix


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's, under a number that has no name."""
    for name in ("HOME", "XDG_CACHE_HOME", CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    finding = find(Machine(tmp_path), "engine cache")
    assert finding.state == "problem"
    assert "no home directory" in finding.value
    with pytest.raises(DiskError, match=f"set {CACHE_VARIABLE}"):
        user_cache()


@pytest.mark.parametrize(
    "path", ["sys/class/devfreq/gpu/min_freq", "proc/meminfo", "proc/device-tree/model",
             "etc/nv_tegra_release", "etc/nvpmodel.conf"],
)  # fmt: skip
def test_a_system_whose_files_are_not_as_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Missing, no text, a folder, a loop: every other finding is there; what is not told is said."""
    monkeypatch.setattr(Machine, "output", lambda *_: "NV Power Mode: 15W")
    machine, file = orin_nano(tmp_path), tmp_path / path
    write(tmp_path, etc__nvpmodel_dot_conf="")
    file.unlink()
    for damage in (
        lambda: None,
        lambda: file.write_bytes(b"\xff\0MemTotal:"),
        lambda: (file.unlink(), file.mkdir()),
        lambda: (file.rmdir(), file.symlink_to(file)),
    ):
        damage()
        found = {finding.name: finding for finding in examine(machine)}
        assert {"Python", "numpy", "ONNX Runtime", "engine cache"} <= found.keys()
        if path.startswith("sys/"):
            assert found["clocks"].value.startswith("cannot be told: ")


def test_commands_of_a_system_that_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs, one that is no program, one that writes what is no text."""
    command = tmp_path / "nvpmodel"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("vqbet_engines.doctor._PATIENCE_S", 0.2)
    for text, told in (
        ("#!/bin/sh\nexec sleep 60\n", "cannot be told: TimeoutExpired"),
        ("", "cannot be told: OSError"),
        ("#!/bin/sh\nprintf '\\377'\n", "nothing"),
    ):
        command.write_text(text)
        command.chmod(0o755)
        found = {finding.name: finding.value for finding in examine(orin_nano(tmp_path / "m"))}
        assert "engine cache" in found
        assert found.get("power", "nothing").startswith(told)


def test_what_was_not_checked_says_so() -> None:
    assert str(Fix("sudo jetson_clocks")) == "sudo jetson_clocks  # not checked"
    assert str(Fix("pip install x", "https://pip.pypa.io")) == "pip install x"


@pytest.mark.parametrize(
    ("names", "states"),
    [
        (["lerobot_policy_vqbet_edge"], []),
        (["lerobot"], ["note"]),
        (["lerobot", "lerobot-policy-vqbet-edge"], ["note"]),
        (["lerobot", "lerobot_policy_vqbet_edge"], ["ok"]),
    ],
)
def test_whether_lerobot_finds_the_plugin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str], states: list[str]
) -> None:
    """LeRobot goes by the name, as its own discovery shows where it is installed."""
    for name in names:
        described = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    there = list(importlib.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr("vqbet_engines.doctor.distributions", lambda: there)
    findings = [finding for finding in examine(Machine()) if finding.name == "LeRobot"]
    assert [finding.state for finding in findings] == states
    if find_spec("lerobot") is None or "lerobot" not in names:
        return
    (tmp_path / "lerobot_policy_vqbet_edge.py").write_text("print('imported')\n")
    code = "from lerobot.utils.import_utils import register_third_party_plugins as r; r()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("imported" in done.stdout) == (states == ["ok"])
