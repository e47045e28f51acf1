"""An environment with Ray, made once and kept in the repository's build folder."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements-ray.txt")


def prepare() -> Path:
    """Its Python. What hinders is the reason of a skip; in CI it fails."""
    texts = [sys.executable, REQUIREMENTS.read_text(), (ROOT / "constraints.txt").read_text()]
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"ray-{key}"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            if failure := _make(folder):
                _impossible(f"Ray cannot be installed: {failure}")
            (folder / "ready").touch()
    return folder / "bin" / "python"


def _impossible(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _make(folder: Path) -> str:
    """Why it could not be made; empty if it was."""
    shutil.rmtree(folder, ignore_errors=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    needs = ["-r", str(REQUIREMENTS), "-c", str(ROOT / "constraints.txt")]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *needs],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=clean)
        if done.returncode:
            return done.stderr[-2000:]
    return ""
