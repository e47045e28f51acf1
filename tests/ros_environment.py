"""An environment with ROS 2 from wheels, made once and kept in the repository's build folder."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "tests" / "ros2" / "requirements.txt"
NODE_TESTS = ROOT / "tests" / "ros2" / "node"


@dataclass(frozen=True)
class Ros:
    """A Python with rclpy, the messages and what the robot's side needs."""

    python: Path

    def environment(self, **also: str) -> dict[str, str]:
        """Of its processes: a network of their own, on this machine alone."""
        places = [ROOT, ROOT / "integrations" / "ros2", NODE_TESTS]
        # Processes that are tested at the same time may not hear each other.
        domain = {"ROS_DOMAIN_ID": str(1 + os.getpid() % 100), "ROS_LOCALHOST_ONLY": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
        return kept | domain | {"PYTHONPATH": os.pathsep.join(map(str, places))} | also


def prepare(version: str | None = None, numpy: str | None = None) -> Ros:
    """The environment of a Python version, this one's if none is given.

    What hinders is the reason of a skip; in CI it fails.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return _impossible(f"there are no wheels of rclpy for {sys.platform} {platform.machine()}")
    interpreter = _interpreter(version)
    if interpreter is None:
        return _impossible(f"there is no Python {version} here")
    install = ["-r", str(REQUIREMENTS)]
    # Another Python has other newest versions.
    install += [f"numpy{numpy}"] if numpy else ["-c", str(ROOT / "constraints.txt")]
    texts = [interpreter, *install, REQUIREMENTS.read_text()]
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"ros2-{key}"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            failure = _make(folder, interpreter, install)
            if failure:
                return _impossible(f"rclpy cannot be installed: {failure}")
            (folder / "ready").touch()
    return Ros(folder / "bin" / "python")


def _impossible(reason: str) -> Ros:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _interpreter(version: str | None) -> str | None:
    if version is None:
        return sys.executable
    found = shutil.which(f"python{version}")
    # A shim may be there of a version that is not.
    works = found and subprocess.run([found, "-V"], capture_output=True).returncode == 0
    return found if works else None


def _make(folder: Path, interpreter: str, install: list[str]) -> str:
    """Why it could not be made; empty if it was."""
    shutil.rmtree(folder, ignore_errors=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in (
        [interpreter, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *install],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=clean)
        if done.returncode:
            return done.stderr[-2000:]
    return ""
