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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RELEASES = {
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3": "tensorrt-cu12-bindings==10.13.3.9.post1",
    "10.16.0": "tensorrt-cu13-bindings==10.16.0.72",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
REPOSITORY = Path(__file__).parents[2]
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


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Bindings:
    """A release's bindings, fetched once and kept in pytest's cache."""
    root = Path(request.config.cache.mkdir("tensorrt-bindings")) / request.param
    if not (root / "stubs").exists():
        if shutil.which("gcc") is None or shutil.which("nm") is None:
            _unavailable("gcc and nm are needed to generate TensorRT's stub libraries")
        shutil.rmtree(root, ignore_errors=True)
        _fetch(RELEASES[request.param], root)
        _generate_stubs(root / "tensorrt_bindings" / "tensorrt.so", root / "stubs")
    return Bindings(root)


def _unavailable(reason: str) -> None:
    """A missing outside thing: a failure where CI promises it, a skip elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _fetch(requirement: str, root: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(root)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    if done.returncode:
        _unavailable(f"cannot fetch {requirement}: {done.stderr[-500:]}")
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
