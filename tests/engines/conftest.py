"""The real Python bindings of TensorRT over generated stub libraries: no GPU, no TensorRT.

NVIDIA publishes bindings and libraries as separate wheels. The bindings are small; the libraries
that they need are generated here from the symbols that they leave undefined.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import miniature
import pytest
from environments import ROOT, alone, impossible
from workshop import once

from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE
from vqbet_edge.runtime.bundle import DECODE_TABLE, Bundle

RELEASES = {
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3": "tensorrt-cu12-bindings==10.13.3.9.post1",
    "10.16.0": "tensorrt-cu13-bindings==10.16.0.72",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
_PREFIXES = ("create", "get", "initLib")


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
        rooms = [ROOT, ROOT / "engines", self.root]
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


# One worker per release: two would fetch into the same folder.
@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in RELEASES])
def release(request: pytest.FixtureRequest) -> Bindings:
    """Bindings of a release, fetched once and kept in the build folder."""
    name = request.param
    root = ROOT / "build" / f"tensorrt-bindings-{sys.implementation.cache_tag}" / name
    root.parent.mkdir(parents=True, exist_ok=True)
    with alone(root):
        if not (root / "stubs").exists():
            if shutil.which("gcc") is None or shutil.which("nm") is None:
                impossible("gcc and nm are needed to generate TensorRT's stub libraries")
            shutil.rmtree(root, ignore_errors=True)
            _fetch(RELEASES[name], root)
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


@pytest.fixture(scope="session")
def bundle(shared: Path) -> Bundle:
    """A window of three, layers that all matter, reference cases."""
    path = shared / "engines.bundle"
    policy = miniature.attentive(0)
    return Bundle.open(once(path, lambda: miniature.write(path, policy, steps=16)))


@pytest.fixture(scope="session")
def untabulated(bundle: Bundle) -> Bundle:
    """The same without the table that replaces the decoder's graph."""
    arrays = {name: array for name, array in bundle.arrays.items() if name != DECODE_TABLE}
    return replace(bundle, arrays=arrays)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where engines are kept."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"
