"""Nothing is imported from the current directory, which may be a bundle that was downloaded."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vqbet_engines.builder import Job, build_plan

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.tensorrt import _build


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exists once the planted module has been imported."""
    here, proof = tmp_path / "test.bundle", tmp_path / "imported"
    here.mkdir()
    (here / "msgspec.py").write_text(f"open({str(proof)!r}, 'w')\n")
    monkeypatch.chdir(here)
    return proof


def test_vqbet_build(proof: Path) -> None:
    bundle: Any = SimpleNamespace(path=Path.cwd())
    tensorrt: Any = SimpleNamespace(flavour="tensorrt")
    with pytest.raises(BackendError, match="exit code 4"):  # it is no bundle
        _build(bundle, tensorrt)
    assert not proof.exists()


def test_the_builders_process(proof: Path) -> None:
    job = Job("tensorrt_rtx", compute_capability="sm86")
    with pytest.raises(BackendError, match="TensorRT can"):
        build_plan(b"no graph", job)
    assert not proof.exists()


@pytest.mark.parametrize("safe", ["", "1"])
def test_pythonpath_counts(tmp_path: Path, safe: str) -> None:
    """With Python's own switch too, where no current directory has to be removed."""
    from vqbet_edge.runtime.backends.child import module_command

    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "program.py").write_text(
        "import sys\ndef main(): print(sys.argv[1:], '' in sys.path)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": safe}
    done = subprocess.run(
        module_command("program", "a b"),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "['a b'] False\n", done.stderr
