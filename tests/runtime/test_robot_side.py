"""What the robot loads: NumPy, msgspec, safetensors and one backend, nothing else."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from workshop import Exported

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"torch", "torchvision", "onnx", "pyarrow", "av", "tyro", "rich", "PIL", "mcap"}

LOADED = """
import sys
before = set(sys.modules)
import vqbet_edge
after_import = set(sys.modules)
from vqbet_edge import EdgePolicy
import json, numpy as np
if len(sys.argv) > 1:
    policy = EdgePolicy.load(sys.argv[1], prove=True)
    action = policy.act({"observation.image": np.zeros((40, 48, 3), np.uint8),
                         "observation.state": np.ones(2, np.float32)})
    assert action.shape == (2,) and np.isfinite(action).all()
top = lambda names: sorted({n.partition(".")[0] for n in names})
ours = [n for n in sys.modules if n.startswith("vqbet_edge.")]
print(json.dumps({"import": top(after_import - before), "act": top(set(sys.modules)), "ours": ours}))
"""


def loaded(python: str, *arguments: str, cwd: Path | None = None) -> dict[str, set[str]]:
    done = subprocess.run(
        [python, "-c", LOADED, *arguments], capture_output=True, text=True, check=True, cwd=cwd
    )
    return {key: set(names) for key, names in json.loads(done.stdout).items()}


def test_import_loads_three_libraries_only() -> None:
    modules = loaded(sys.executable)["import"]
    assert not modules & (FORBIDDEN | {"onnxruntime"})
    # msgspec looks for typing_extensions and does without it.
    ours = {"vqbet_edge", "typing_extensions"}
    third_party = modules - set(sys.stdlib_module_names) - ours
    assert third_party == {"numpy", "msgspec", "safetensors"}


def test_acting_loads_one_backend_more(tiny: Exported) -> None:
    modules = loaded(sys.executable, str(tiny.bundle))
    assert not modules["act"] & FORBIDDEN
    only_runtime(modules["ours"])


def only_runtime(modules: set[str]) -> None:
    assert "vqbet_edge.runtime.policy" in modules
    outside = {name for name in modules if not name.startswith("vqbet_edge.runtime")}
    assert outside == {"vqbet_edge.errors"}


@pytest.mark.extended
def test_acts_in_an_environment_with_the_runtime_only(tiny: Exported, tmp_path: Path) -> None:
    """A new virtual environment, the package with its extra `cpu`, and nothing else."""
    environment = tmp_path / "robot"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "--no-compile"]
    install += ["-c", str(ROOT / "constraints.txt")]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*install, f"{ROOT}[cpu]"], capture_output=True, text=True, env=clean)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip("the package index is out of reach")
    assert done.returncode == 0, done.stderr
    bundle = shutil.copytree(tiny.bundle, tmp_path / "policy.bundle")
    modules = loaded(python, str(bundle), cwd=tmp_path)
    assert not modules["act"] & FORBIDDEN
    only_runtime(modules["ours"])
    probe = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, sys.argv[1:])))"
    assert subprocess.run([python, "-c", probe, *FORBIDDEN], cwd=tmp_path).returncode == 0
