"""LeRobot of this Python and LeRobot 0.6.1 of Python 3.12, each with the plugin installed."""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from peers import PUSHT, Peer, Robot
from vqbet_export.exporter import ExportConfig, export

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "integrations" / "lerobot"
sys.path.append(str(PLUGIN))

NEWEST = "0.6.1"
NEWEST_NEEDS = [f"lerobot[training,pusht]=={NEWEST}", "onnxruntime==1.32.0", "msgspec==0.22.0"]


def attentive(policy: object) -> None:
    """Let an untrained policy look at what it sees: its codes change along an episode."""
    for name, weight in policy.named_parameters():  # type: ignore[attr-defined]
        if ".attn." in name and name.endswith("weight"):
            weight.data.mul_(12)


@pytest.fixture(scope="session")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Robot:
    """PushT's sizes, small, untrained."""
    root = tmp_path_factory.mktemp("robot")
    policy = oracle.make_policy(PUSHT)
    with torch.no_grad():
        attentive(policy)
    policy.config.license = "mit"
    made = Robot(root / "checkpoint", root / "pusht-fp32.bundle")
    oracle.save_checkpoint(policy, PUSHT, made.checkpoint)
    export(ExportConfig(str(made.checkpoint), made.bundle, verify_steps=8))
    return made


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of the package and of the plugin, and nothing else."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", folder]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, ROOT, PLUGIN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def newest(installed: Path) -> Peer:
    """LeRobot 0.6.1, installed once below the build folder."""
    root = ROOT / "build" / f"lerobot-{NEWEST}"
    python, complete = root / "bin" / "python", root / "complete"
    root.parent.mkdir(exist_ok=True)
    with root.with_suffix(".lock").open("w") as lock:  # other workers want the same one
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            _install(root)
            complete.touch()
    return Peer(str(python), installed)


@pytest.fixture(params=["this", pytest.param("newest", marks=pytest.mark.xdist_group("lerobot"))])
def peer(request: pytest.FixtureRequest, installed: Path) -> Peer:
    """Each LeRobot in turn."""
    if request.param == "newest":
        found: Peer = request.getfixturevalue("newest")
        return found
    oracle.lerobot("policies.factory")
    return Peer(sys.executable, installed)


def _install(root: Path) -> None:
    base = _python312()
    if base is None:
        pytest.skip("there is no Python 3.12 for LeRobot 0.6.1")
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run([base, "-m", "venv", root], check=True)
    command = [root / "bin" / "python", "-m", "pip", "install", "-q", *NEWEST_NEEDS]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"cannot install LeRobot {NEWEST}: {done.stderr[-2000:]}")
        pytest.skip(f"LeRobot {NEWEST} cannot be installed: the package index is out of reach")


@functools.cache
def _python312() -> str | None:
    """A Python 3.12 that starts: the one on the path may belong to a version manager."""
    managed = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))
    for found in (shutil.which("python3.12"), *managed):
        if found is not None:
            done = subprocess.run([found, "-c", "import venv"], capture_output=True)
            if done.returncode == 0:
                return str(found)
    return None
