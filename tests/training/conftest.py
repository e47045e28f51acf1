"""What the tests of data sets and training share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import oracle
import pytest
import torch
import two_ways
from workshop import once

from vqbet_edge.training import trainer


@pytest.fixture(scope="session")
def lerobot() -> Callable[[str], ModuleType]:
    """Imports a module of LeRobot, the reference; in CI its absence is a failure, elsewhere a skip."""
    return oracle.lerobot


@pytest.fixture(scope="session")
def pusht() -> Path:
    """Four episodes of human demonstrations."""
    return Path(__file__).parents[1] / "data" / "pusht"


@pytest.fixture(scope="session")
def two_ways_run(shared: Path) -> Path:
    """The folder of a task with two ways: its `data`, and the `run` of a policy for it."""
    root = shared / "two_ways"
    return once(root, lambda: two_ways.prepare(root))


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends without its report on codes and its curves, which take longer than small runs."""
    for name in ("write_report", "draw_curves", "text"):
        monkeypatch.setattr(trainer, name, lambda *_: "")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of torch in float64: two ways to the same number then agree on every processor.

    LeRobot's codebooks cast their input with `Tensor.float()`, our images do: to float64 here.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
