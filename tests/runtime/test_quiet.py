"""Nothing is sent and nothing is left in the home, whatever the libraries' defaults are.

Native code sends and writes too, so that the system itself is asked: a home that was empty, and
the addresses that any thread of any child process spoke to.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import recordings
from sizes import SMALL

TESTS = Path(__file__).parents[1]
PUSHT = TESTS / "data" / "pusht"
# What would make a library behave otherwise than at a user's: several stay quiet on CI servers.
HIDDEN = {
    *("CI", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY", "MPLCONFIGDIR"),
}
MATPLOTLIB = {".cache/matplotlib", ".config/matplotlib"}

OBSERVATION = """
import numpy as np
OBSERVATION = {"observation.image": np.zeros((24, 24, 3), np.uint8),
               "observation.state": np.zeros(2, np.float32)}
"""
# NumPy and ONNX Runtime open their own libraries; else nothing is started, asked or unpickled.
ACT = f"""
import sys
def refuse(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "subprocess.", "os.system", "os.exec",
                         "os.posix_spawn", "pickle.", "webbrowser.")):
        raise AssertionError(event)
sys.addaudithook(refuse)
{OBSERVATION}
import os
from vqbet_edge import EdgePolicy
def act():
    with EdgePolicy.load(sys.argv[1], "onnxruntime", prove=True) as policy:
        policy.act(OBSERVATION)
if (child := os.fork()) == 0:
    act()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
act()
import socket
try:
    socket.socket()
except AssertionError:
    sys.exit()
sys.exit("nothing was watched")
"""
SERVE = f"""
{OBSERVATION}
import re, subprocess, sys
from vqbet_edge import Guards
from vqbet_serve import RemotePolicy
code = "from vqbet_serve.cli import main; main()"
command = [sys.executable, "-c", code, sys.argv[1], "--port", "0"]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    url = next(found[0] for line in server.stderr if (found := re.search(r"ws://\\S+", line)))
    try:
        with RemotePolicy(url, guards=Guards(deadline_s=30, on_late="raise")) as robot:
            robot.act(OBSERVATION)
    finally:
        server.terminate()
"""
# Connecting a datagram socket sends nothing; the addresses are those of documents.
SPEAK = """
import socket
for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
    socket.socket(family, socket.SOCK_DGRAM).connect_ex((address, 9))
"""
TRAINING = SMALL | {
    "steps": 4, "n_vqvae_training_steps": 2, "batch_size": 2, "n_obs_steps": 2,
    "vqvae_embedding_dim": 32, "vqvae_enc_hidden_dim": 32,
}  # fmt: skip


class Traces(NamedTuple):
    """What a process and its children left: folders under the home that hold files, and addresses
    beyond this machine, None where nothing can watch them."""

    folders: set[str]
    addresses: set[str] | None


def watch(folder: Path, *command: str, **variables: str) -> Traces:
    """Run a command with an empty home."""
    home, log = folder / "home", folder / "calls"
    home.mkdir()
    kept = {
        k: v for k, v in os.environ.items() if k not in HIDDEN and k[:4] not in {"XDG_", "HF_H"}
    }
    tracer = ["strace", "-f", "--seccomp-bpf", "-qq"]
    tracer += ["-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(log)]
    done = subprocess.run(
        [*(tracer if shutil.which("strace") else []), *command],
        env=kept | {"HOME": str(home)} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    addresses = _addresses(log.read_text()) if log.exists() else None
    return Traces({str(path.parent) for path in files}, addresses)


def _addresses(calls: str) -> set[str]:
    found = re.findall(r'inet_addr\("([^"]+)"|inet_pton\(AF_INET6, "([^"]+)"', calls)
    return {four or six for four, six in found if not (four.startswith("127.") or six == "::1")}


def run(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", f"from {module} import main; main()", *map(str, arguments)]


def quiet(traces: Traces, *kept: str) -> None:
    assert traces.folders <= set(kept)
    assert not traces.addresses


def test_acting_serving_and_looking(mini: Path, tmp_path: Path) -> None:
    recordings.record(mini, tmp_path / "recording")
    commands = {
        "act": [sys.executable, "-c", ACT, str(mini)],
        "serve": [sys.executable, "-c", SERVE, str(mini)],
        "doctor": run("vqbet_engines.doctor_command", mini),
        "bench": run("vqbet_bench.cli", mini, "--seconds", "0.2", "--rounds", "1"),
        "view": run("vqbet_edge.view.command", tmp_path / "recording", "-o", "x.html"),
    }
    for name, command in commands.items():
        (tmp_path / name).mkdir()
        quiet(watch(tmp_path / name, *command))


@pytest.mark.extended
def test_training_exporting_calibrating_and_evaluating(tmp_path: Path) -> None:
    """Only Matplotlib keeps its list of fonts."""
    sizes = [text for name, value in TRAINING.items() for text in (f"--{name}", value)]
    trained = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    calibrated = ["--int8", "--calibration-data", PUSHT, "--calibration-steps", 32]
    train = run("vqbet_edge.training.cli", "--dataset", PUSHT, "--output", tmp_path / "run", *sizes)
    export = run("vqbet_export.cli", trained, *calibrated, "--verify-steps", 8, "-o", "x.bundle")
    drive = run("vqbet_edge.training.evaluation.cli", trained, "--env", "pusht", "--episodes", 1)
    for name, command in {"train": train, "export": export, "eval": drive}.items():
        (tmp_path / name).mkdir()
        quiet(watch(tmp_path / name, *command), *MATPLOTLIB)


def test_the_users_own_setting_holds(mini: Path, tmp_path: Path) -> None:
    """And proves that what is watched here would be seen."""
    opened = "import sys, time; from vqbet_edge import EdgePolicy; EdgePolicy.load(sys.argv[1])"
    traces = watch(tmp_path, sys.executable, "-c", opened, str(mini), ORT_DISABLE_TELEMETRY="0")
    (tmp_path / "speaking").mkdir()
    spoken = watch(tmp_path / "speaking", sys.executable, "-c", SPEAK).addresses
    assert spoken is None or {"192.0.2.1", "2001:db8::1"} <= spoken
    if tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 29):
        assert any("Microsoft" in folder for folder in traces.folders)
