"""A policy to serve, and the unmodified openpi-client in an environment of its own."""

import os
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from vqbet_edge import EdgePolicy


@pytest.fixture
def policy(mini: Path) -> Iterator[EdgePolicy]:
    with EdgePolicy.load(mini, "onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def openpi_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python with openpi-client, which wants NumPy 1."""
    folder = tmp_path_factory.mktemp("openpi") / "env"
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    # openpi-client forgets typing_extensions.
    wanted = ["openpi-client", "numpy<2", "typing_extensions"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "-q", *wanted]
    done = subprocess.run(install, capture_output=True, text=True, env=clean)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip("the package index is out of reach")
    assert done.returncode == 0, done.stderr
    return python
