"""LeRobot of this Python and LeRobot 0.6.1 of Python 3.12, each with the plugin installed."""

import subprocess
import sys
from pathlib import Path

import oracle
import pytest
from environments import ROOT, find_python, with_the_reference
from peers import PUSHT, Peer, Robot
from vqbet_export.exporter import ExportConfig, export
from workshop import once

PLUGIN = ROOT / "integrations" / "lerobot"
sys.path.append(str(PLUGIN))


@pytest.fixture(scope="session")
def robot(shared: Path) -> Robot:
    """PushT's sizes, small, untrained."""
    root = shared / "robot"
    made = Robot(root / "checkpoint", root / "pusht-fp32.bundle")

    def make() -> None:
        policy = oracle.make_policy(PUSHT)
        # So that an untrained policy looks at what it sees: its codes change along an episode.
        for name, weight in policy.named_parameters():
            if ".attn." in name and name.endswith("weight"):
                weight.data.mul_(12)
        policy.config.license = "mit"
        oracle.save_checkpoint(policy, PUSHT, made.checkpoint)
        export(ExportConfig(str(made.checkpoint), made.bundle, verify_steps=8))

    once(root, make)
    return made


@pytest.fixture(scope="session")
def installed(shared: Path) -> Path:
    """A folder with the wheels of the package and of the plugin, and nothing else."""
    pytest.importorskip("hatchling")
    folder = shared / "installed"

    def install() -> None:
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", folder]
        command = [sys.executable, "-m", "pip", "install", "-q", *options, ROOT, PLUGIN]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return once(folder, install)


@pytest.fixture(scope="session")
def newest(installed: Path) -> Peer:
    """LeRobot 0.6.1."""
    if oracle.newest():
        return Peer(sys.executable, installed)
    if find_python("3.12") is None:
        pytest.skip("there is no Python 3.12 for LeRobot 0.6.1")
    return Peer(str(with_the_reference("3.12")), installed)


OTHERS = (
    [] if oracle.newest() else [pytest.param("newest", marks=pytest.mark.xdist_group("lerobot"))]
)


@pytest.fixture(params=["this", *OTHERS])
def peer(request: pytest.FixtureRequest, installed: Path) -> Peer:
    """Each LeRobot in turn."""
    if request.param == "newest":
        found: Peer = request.getfixturevalue("newest")
        return found
    oracle.lerobot("policies.factory")
    return Peer(sys.executable, installed)
