"""The real Python bindings of TensorRT over generated stub libraries: no GPU, no TensorRT.

NVIDIA publishes bindings and libraries as separate wheels. The bindings are small; the libraries
that they need are generated here from the symbols that they leave undefined.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import miniature
import msgspec
import pytest
import torch
from environments import alone, impossible
from safetensors.numpy import save
from vqbet_export.assembly import assemble
from vqbet_export.publishing import publish
from workshop import once

from vqbet_edge.runtime.bundle import DECODE_TABLE, RUNTIME_NAME, Bundle
from vqbet_edge.runtime.manifest import VerificationSpec
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import Feature, FeatureType, VQBeTConfig
from vqbet_edge.training.layouts import Layout
from vqbet_edge.training.network import VQBeT

RELEASES = {
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3": "tensorrt-cu12-bindings==10.13.3.9.post1",
    "10.16.0": "tensorrt-cu13-bindings==10.16.0.72",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
REFUSED = {"8.6.1": "tensorrt-bindings==8.6.1"}
REPOSITORY = Path(__file__).parents[2]
# The last is C++: the parsers of TensorRT 8.
_PREFIXES = ("create", "get", "initLib", "_ZN")


@dataclass(frozen=True)
class Bindings:
    """An unpacked bindings wheel beside its stub libraries."""

    root: Path

    def run(self, code: str) -> Any:
        """Run Python with these bindings as `tensorrt`; what it prints is JSON."""
        preamble = (
            "import sys, json, warnings; warnings.simplefilter('ignore')\n"
            "import tensorrt_bindings; sys.modules['tensorrt'] = tensorrt_bindings\n"
        )
        rooms = [REPOSITORY, REPOSITORY / "engines", self.root]
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(self.root / "stubs"),
            "PYTHONPATH": os.pathsep.join(map(str, rooms)),
        }
        done = subprocess.run(
            [sys.executable, "-c", preamble + code],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def _each(releases: dict[str, str]) -> list[Any]:
    """One worker per release: two would fetch into the same folder."""
    return [pytest.param(n, id=n, marks=pytest.mark.xdist_group(n)) for n in releases]


@pytest.fixture(params=_each(RELEASES))
def release(request: pytest.FixtureRequest) -> Bindings:
    """Bindings of a release that is supported."""
    return _bindings(request, request.param)


@pytest.fixture(params=_each(REFUSED))
def old_release(request: pytest.FixtureRequest) -> Bindings:
    """Bindings of a release that is refused."""
    if sys.version_info >= (3, 12):
        pytest.skip("TensorRT 8.6 has no bindings for Python 3.12")
    return _bindings(request, request.param)


def _bindings(request: pytest.FixtureRequest, name: str) -> Bindings:
    """Fetched once and kept in pytest's cache."""
    python = sys.implementation.cache_tag
    root = Path(request.config.cache.mkdir(f"tensorrt-bindings-{python}")) / name
    with alone(root):
        if not (root / "stubs").exists():
            if shutil.which("gcc") is None or shutil.which("nm") is None:
                impossible("gcc and nm are needed to generate TensorRT's stub libraries")
            shutil.rmtree(root, ignore_errors=True)
            _fetch((RELEASES | REFUSED)[name], root)
            _generate_stubs(root / "tensorrt_bindings" / "tensorrt.so", root / "stubs")
    return Bindings(root)


def _fetch(requirement: str, root: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(root)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    if done.returncode:
        impossible(f"cannot fetch {requirement}: {done.stderr[-500:]}")
    for wheel in root.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root)


def _generate_stubs(module: Path, folder: Path) -> None:
    undefined = _output("nm", "-D", "--undefined-only", str(module)).split()
    ours = {name for name in undefined if name.startswith(_PREFIXES) and "@" not in name}
    needed = [
        line.split("[")[1].rstrip("]")
        for line in _output("readelf", "-d", str(module)).splitlines()
        if "NEEDED" in line and "libnv" in line
    ]
    work = folder.with_suffix(".work")
    work.mkdir()
    source = work / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in sorted(ours)))
    for library in needed:
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}"]
        _output("gcc", *flags, "-o", str(work / library), str(source))
    work.rename(folder)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


BundleFactory = Callable[..., Bundle]


@pytest.fixture(scope="session")
def make_bundle(shared: Path) -> BundleFactory:
    """Bundles of untrained policies, one for every set of arguments.

    `precision` is fp32 or fp16; the rest is the policy's configuration.
    """

    @functools.cache
    def make(precision: str = "fp32", **fields: Any) -> Bundle:
        name = hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:12]
        path = shared / f"{name}-{precision}.bundle"
        made = once(path, lambda: write_bundle(path, precision, small_checkpoint(**fields)))
        return Bundle.open(made)

    return make


def small_checkpoint(**fields: Any) -> Checkpoint:
    """An untrained policy of the default size, or of the size that the fields say."""
    torch.manual_seed(0)
    image, state, action = (3, 96, 96), (2,), (2,)
    config = VQBeTConfig(
        input_features={
            "observation.image": Feature(FeatureType.VISUAL, image),
            "observation.state": Feature(FeatureType.STATE, state),
        },
        output_features={"action": Feature(FeatureType.ACTION, action)},
        **({"pretrained_backbone_weights": None, "use_group_norm": False} | fields),
    )
    network = VQBeT(config).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # folding an identity would prove nothing
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return Checkpoint(network, {}, {}, Layout.V0_4, "test", "0" * 64)


def write_bundle(path: Path, precision: Any, checkpoint: Checkpoint) -> None:
    """As the exporter does, but unverified, and without the table that replaces the decoder."""
    draft = assemble(checkpoint, path, precision)
    arrays = {name: array for name, array in draft.arrays.items() if name != DECODE_TABLE}
    contents = {**draft.contents, RUNTIME_NAME: save(arrays)}
    verification = VerificationSpec("random", "random", 1, 0.0, 1.0, 1.0)
    publish(path, contents, msgspec.structs.replace(draft.manifest, verification=verification))


@pytest.fixture(scope="session")
def mini_of_3(shared: Path) -> Path:
    """`mini` with a window of three, and reference cases."""
    path = shared / "mini-3.bundle"
    return once(path, lambda: miniature.write(path, steps=16, n_obs_steps=3))
