"""What the tests of data sets and training share."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def lerobot() -> Callable[[str], ModuleType]:
    """Imports a module of LeRobot, the judge; in CI its absence is a failure, elsewhere a skip."""

    def load(name: str) -> ModuleType:
        try:
            return importlib.import_module(f"lerobot.{name}")
        except ImportError:
            if os.environ.get("CI"):
                raise
            pytest.skip("LeRobot is not installed")

    return load


@pytest.fixture(scope="session")
def pusht() -> Path:
    """Four episodes of human demonstrations."""
    return Path(__file__).parents[1] / "data" / "pusht"
