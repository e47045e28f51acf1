"""A policy to serve, and the unmodified openpi-client in an environment of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import prepare

from vqbet_edge import EdgePolicy


@pytest.fixture
def policy(mini: Path) -> Iterator[EdgePolicy]:
    with EdgePolicy.load(mini, "onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def openpi_python() -> str:
    """Python with openpi-client, which wants NumPy 1, and with msgpack-numpy."""
    # openpi-client forgets typing_extensions.
    needs = ["openpi-client", "numpy<2", "typing_extensions", "msgpack-numpy"]
    return str(prepare("openpi", needs))
