"""What tests of the exporter and of the runtime share."""

from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
from workshop import Exported, Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def tiny(workshop: Workshop) -> Exported:
    """A bundle that is quick to make and to run."""
    return workshop.bundle(oracle.TINY)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
