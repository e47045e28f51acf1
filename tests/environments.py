"""Python environments for what cannot share ours, made once and kept in the build folder."""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]


def impossible(reason: str) -> NoReturn:
    """Skip for this reason; in CI it fails."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def find_python(version: str) -> str | None:
    """A Python that starts: the one on the path may be a version manager's stub."""
    managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for found in (shutil.which(f"python{version}"), *managed):
        if found is not None:
            done = subprocess.run([found, "-c", "import venv"], capture_output=True)
            if done.returncode == 0:
                return str(found)
    return None


def prepare(name: str, install: Sequence[str], python: str = sys.executable) -> Path:
    """The Python of an environment with what pip was told to install.

    Args:
        name: of its folder, before a digest of all that decides what is in it.
        install: arguments of `pip install`.
        python: which makes it.
    """
    files = [Path(each).read_text() for each in install if Path(each).is_file()]
    key = hashlib.sha256("\n".join([python, *install, *files]).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"{name}-{key}"
    folder.parent.mkdir(exist_ok=True)
    with alone(folder):
        if not (folder / "ready").exists():
            failure = _make(folder, install, python)
            if failure:
                impossible(f"{name} cannot be installed: {failure}")
            (folder / "ready").touch()
    return folder / "bin" / "python"


def with_the_reference(version: str) -> Path:
    """The Python of the environment in which `make test PYTHON=python<version>` runs."""
    folder = ROOT / f".venv-{version}"
    (ROOT / "build").mkdir(exist_ok=True)
    with alone(ROOT / "build" / folder.name):
        make = ["make", "--silent", f"{folder.name}/.reference", f"PYTHON=python{version}"]
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        impossible(f"{folder.name} cannot be made: {done.stderr[-2000:]}")
    return folder / "bin" / "python"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Other workers, who want the same folder, wait until it is made."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path, install: Sequence[str], python: str) -> str:
    """Why it could not be made; empty if it was."""
    shutil.rmtree(folder, ignore_errors=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in (
        [python, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--no-compile", *install],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=clean)
        if done.returncode:
            return done.stderr[-2000:]
    return ""
