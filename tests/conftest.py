"""What tests of the exporter and of the runtime share."""

import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import miniature
import oracle
import pytest
from two_cameras import Trained, prepare
from workshop import Exported, Workshop, once, tracing_once

_UNPICKLED: list[str] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    # Processes of one program may send each other pickles; files may not be read so.
    if event == "pickle.find_class":
        stack = "".join(traceback.format_stack(limit=12))
        if "multiprocessing" not in stack:
            _UNPICKLED.append(f"{arguments}\n{stack}")


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def unpickled() -> Iterator[list[str]]:
    """Nothing is unpickled in any test: what is would be listed here, and fails it."""
    _UNPICKLED.clear()
    yield _UNPICKLED
    assert _UNPICKLED == []


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share; what is in it, `once` makes and nobody changes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def traced(shared: Path) -> Iterator[None]:
    """Whoever exports shares the graphs that are the same."""
    with tracing_once(shared / "graphs"):
        yield


@pytest.fixture(scope="session")
def workshop(shared: Path) -> Workshop:
    return Workshop(shared)


@pytest.fixture(scope="session")
def tiny(workshop: Workshop) -> Exported:
    """A bundle that is quick to make and to run."""
    return workshop.bundle(oracle.TINY)


@pytest.fixture(scope="session")
def mini(shared: Path) -> Path:
    """The smallest bundle, exported from an untrained network of ours."""
    path = shared / "mini.bundle"
    return once(path, lambda: miniature.write(path))


@pytest.fixture(scope="session")
def two_cameras(shared: Path) -> Trained:
    """A policy that was trained on two cameras of different sizes."""
    return prepare(shared / "cameras_of_two_sizes")


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
