"""A policy to serve."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vqbet_edge import EdgePolicy


@pytest.fixture
def policy(mini: Path) -> Iterator[EdgePolicy]:
    with EdgePolicy.load(mini, "onnxruntime") as loaded:
        yield loaded
