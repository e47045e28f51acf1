"""What the tests of data sets and training share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import oracle
import pytest
import torch
import two_ways


@pytest.fixture(scope="session")
def lerobot() -> Callable[[str], ModuleType]:
    """Imports a module of LeRobot, the judge; in CI its absence is a failure, elsewhere a skip."""
    return oracle.lerobot


@pytest.fixture(scope="session")
def pusht() -> Path:
    """Four episodes of human demonstrations."""
    return Path(__file__).parents[1] / "data" / "pusht"


@pytest.fixture(scope="session")
def two_ways_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task with two ways: its `data`, and the `run` of a policy for it."""
    root = tmp_path_factory.mktemp("two_ways")
    two_ways.prepare(root)
    return root


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of torch in float64: two ways to the same number then agree on every processor.

    LeRobot's codebooks cast their input with `Tensor.float()`, our images do: to float64 here.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
