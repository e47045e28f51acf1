"""What the tests of data sets and training share."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import oracle
import pytest


@pytest.fixture(scope="session")
def lerobot() -> Callable[[str], ModuleType]:
    """Imports a module of LeRobot, the judge; in CI its absence is a failure, elsewhere a skip."""
    return oracle.lerobot


@pytest.fixture(scope="session")
def pusht() -> Path:
    """Four episodes of human demonstrations."""
    return Path(__file__).parents[1] / "data" / "pusht"
