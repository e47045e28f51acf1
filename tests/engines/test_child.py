"""Nothing is imported from the current directory, which may be a bundle that was downloaded."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vqbet_engines.builder import Job, build_plan

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.backends.tensorrt import _build


def test_not_by_vqbet_build_nor_by_the_builders_process(cwd: Path, tmp_path_factory: Any) -> None:
    proof = tmp_path_factory.mktemp("proof") / "imported"
    (cwd / "msgspec.py").write_text(f"open({str(proof)!r}, 'w')\n")
    bundle: Any = SimpleNamespace(path=cwd)
    tensorrt: Any = SimpleNamespace(flavour="tensorrt")
    with pytest.raises(BackendError, match="exit code 4"):  # it is no bundle
        _build(bundle, tensorrt)
    with pytest.raises(BackendError, match="TensorRT can"):
        build_plan(b"no graph", Job("tensorrt_rtx", compute_capability="sm86"))
    assert not proof.exists()


@pytest.mark.parametrize("safe", ["", "1"])
def test_pythonpath_counts(tmp_path: Path, safe: str) -> None:
    """With Python's own switch too, where no current directory has to be removed."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "program.py").write_text(
        "import sys\ndef main(): print(sys.argv[1:], '' in sys.path)\n"
    )
    done = subprocess.run(
        module_command("program", "a b"),
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": safe},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "['a b'] False\n", done.stderr
