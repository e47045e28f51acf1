"""`vqbet-doctor`: what is installed here, what is missing, and the command that fixes it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Literal

from msgspec import Struct

from vqbet_edge.errors import BackendError, DiskError
from vqbet_edge.runtime.backends.cuda import VISIBLE_VARIABLE, create_cuda
from vqbet_edge.runtime.backends.onnxruntime import import_onnxruntime
from vqbet_edge.runtime.backends.private_files import (
    CACHE_VARIABLE,
    RejectedError,
    check_folder,
    user_cache,
)
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
from vqbet_engines.boards import JetPack, detect_board, match_jetpack

State = Literal["ok", "note", "problem"]


class Fix(Struct, frozen=True):
    """What to type, and the documentation that it was checked against; empty when it was not."""

    command: str
    source: str = ""

    def __str__(self) -> str:
        return self.command if self.source else f"{self.command}  # not checked"


class Finding(Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `problem` stops the robot or the build, `note` makes it slower than it could be.
        value: what was found.
        fix: what to type; None when there is nothing to fix, or nothing to type for it.
    """

    name: str
    state: State
    value: str
    fix: Fix | None = None


_NEEDED_BYTES = 1 << 30  # four engines, their timing cache, and room to replace them
_PATIENCE_S = 10  # with a command that tells about the machine
# What files and commands of a system that is broken, or is none that we know, come to.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError)
_PLUGIN = "lerobot_policy_vqbet_edge"
_LEAST = {"numpy": (1, 24), "msgspec": (0, 18), "safetensors": (0, 4)}
_SETUP = "https://docs.nvidia.com/jetson/agx-orin-devkit/user-guide/setup_jetpack.html"
_FLASHING = "https://docs.nvidia.com/jetson/jetpack/install-setup/index.html"
_TENSORRT = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/installing-tensorrt/install-pip.html"
)
_BINDINGS = "https://nvidia.github.io/cuda-python/cuda-bindings/latest/support.html"
_POWER = (
    "https://docs.nvidia.com/jetson/l4t/"
    "Tegra%20Linux%20Driver%20Package%20Development%20Guide/power_management_nano.html"
)
_GROUPS = "https://github.com/NVIDIA/NemoClaw/pull/5018"
_VENV = "https://docs.python.org/3/library/venv.html"
_PIP = "https://pip.pypa.io/en/stable/cli/pip_install/"
_OURS = "docs/engines.md"
_PLUGIN_FOLDER = "./integrations/lerobot  # in a clone of vqbet-edge"
_PLUGIN_DOCS = "integrations/lerobot/README.md"

_NEWER_JETPACK = Fix("flash JetPack 6.2 or newer with NVIDIA SDK Manager", _FLASHING)


@dataclass(frozen=True)
class Machine:
    """Where to look; tests look elsewhere."""

    root: Path = Path("/")

    def read(self, path: str) -> str:
        """Text of a file; empty when there is none, or it cannot be read."""
        file = self.root / path
        with suppress(OSError):
            return file.read_text(errors="replace") if file.is_file() else ""
        return ""

    def output(self, *command: str) -> str:
        """What a command prints; empty when it is missing."""
        if shutil.which(command[0]) is None:
            return ""
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, errors="replace", check=False, timeout=_PATIENCE_S
        )
        return done.stdout + done.stderr  # nvpmodel uses both

    @property
    def l4t(self) -> str:
        """Version of Jetson Linux, such as "36.4.3"; empty elsewhere."""
        text = self.read("etc/nv_tegra_release")
        found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
        return f"{found[1]}.{found[2]}" if found else ""

    @property
    def jetpack(self) -> JetPack | None:
        """The JetPack release that Jetson Linux belongs to."""
        return match_jetpack(self.l4t)

    @property
    def gpu_state(self) -> State:
        """How bad it is when the GPU cannot be used: it is what a Jetson is for."""
        return "problem" if self.l4t else "note"


def examine(machine: Machine) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    checks = (
        _board, _python, _packages, _tensorrt, _access, _gpu, _onnxruntime, _lerobot,
        _power, _clocks, _cache,
    )  # fmt: skip
    found: list[Finding] = []
    for check in checks:
        try:
            found += check(machine)
        except _UNREADABLE as error:  # noqa: PERF203 - a handful
            text = f"cannot be told: {type(error).__name__}: {error}"
            found.append(Finding(check.__name__.strip("_"), "note", text))
    return found


def _board(machine: Machine) -> Iterator[Finding]:
    if not machine.l4t:
        yield Finding("board", "ok", f"{platform.machine()}, no Jetson")
        return
    model, name = machine.read("proc/device-tree/model").strip("\0\n "), detect_board(machine.root)
    yield Finding("board", "ok" if name else "note", f"{model}, profile: {name or 'none'}")
    release = machine.jetpack
    if release is None:
        yield Finding("JetPack", "note", f"Jetson Linux {machine.l4t} is not known here")
    elif release.supported:
        yield Finding("JetPack", "ok", f"{release.version} (Jetson Linux {machine.l4t})")
    else:
        text = f"{release.version}: opset 20 needs TensorRT 10, this has {release.tensorrt}"
        yield Finding("JetPack", "problem", text, _NEWER_JETPACK)


def _python(machine: Machine) -> Iterator[Finding]:
    text, settings = platform.python_version(), Path(sys.prefix) / "pyvenv.cfg"
    isolated = settings.exists() and "site-packages = true" not in settings.read_text()
    if machine.l4t and isolated:
        fix = Fix("python3 -m venv --system-site-packages .venv", _VENV)
        yield Finding("Python", "note", f"{text}, in an environment without JetPack's", fix)
    else:
        yield Finding("Python", "ok", text)


def _packages(_machine: Machine) -> Iterator[Finding]:
    for name, least in _LEAST.items():
        fix = Fix(f"pip install '{name}>={'.'.join(map(str, least))}'", _PIP)
        try:
            text = version(name)
        except PackageNotFoundError:
            yield Finding(name, "problem", "missing", fix)
            continue
        if tuple(map(int, re.findall(r"\d+", text)[:2])) >= least:
            yield Finding(name, "ok", text)
        else:
            yield Finding(name, "problem", text, fix)


def _tensorrt(machine: Machine) -> Iterator[Finding]:
    try:
        tensorrt = import_tensorrt()
    except BackendError as error:
        if "too old" in str(error):
            fix = _NEWER_JETPACK
        elif machine.l4t:
            fix = Fix("sudo apt update && sudo apt install nvidia-jetpack", _SETUP)
        else:
            fix = Fix("pip install tensorrt", _TENSORRT)
        yield Finding("TensorRT", machine.gpu_state, str(error), fix)
        return
    text, release = f"{tensorrt.flavour} {tensorrt.version}", machine.jetpack
    if release is None or tensorrt.version.startswith(release.tensorrt.rsplit(".", 1)[0]):
        yield Finding("TensorRT", "ok", text)
    else:
        yield Finding("TensorRT", "note", f"{text}; this JetPack brings {release.tensorrt}")


def _access(machine: Machine) -> Iterator[Finding]:
    """Device files belong to groups that the desktop's user is in, and a service's user is not."""
    nodes = [machine.root / "dev/nvmap", *sorted((machine.root / "dev/dri").glob("renderD*"))]
    closed = [node for node in nodes if node.exists() and not os.access(node, os.R_OK)]
    if not machine.l4t or not closed:
        return
    names = ", ".join(f"/{node.relative_to(machine.root)}" for node in closed)
    fix = Fix('sudo usermod -aG video,render "$(id -un)"  # and log in again', _GROUPS)
    yield Finding("GPU access", "problem", f"user {os.geteuid()} may not open {names}", fix)


def _gpu(machine: Machine) -> Iterator[Finding]:
    try:
        cuda = create_cuda()
        device, count = cuda.device, len(cuda.visible())
    except BackendError as error:
        # A wheel for aarch64 too, unlike pycuda's. Bindings of CUDA 13 need a driver of CUDA 13.
        release = machine.jetpack
        old = release is not None and release.cuda.startswith("12.")
        package = "'cuda-bindings<13'" if old else "cuda-bindings"
        fix = Fix(f"pip install {package}", _BINDINGS) if "pip install" in str(error) else None
        yield Finding("CUDA", machine.gpu_state, str(error), fix)
        return
    kind = "integrated" if device.integrated else "discrete"
    text = f"{device.name} (compute capability {device.compute_capability}, {kind})"
    if count > 1:
        text += f", the first of {count}; {VISIBLE_VARIABLE} chooses another"
    yield Finding("GPU", "ok", text)
    yield Finding("CUDA driver", "ok", device.driver)


def _onnxruntime(machine: Machine) -> Iterator[Finding]:
    try:
        onnxruntime = import_onnxruntime()
    except BackendError as error:
        # A Jetson has its GPU; elsewhere nothing else may be left.
        state: State = "note" if machine.l4t else "problem"
        found, _, advice = str(error).rpartition("; ")
        command = advice.rpartition(": ")[2]
        fix = Fix(command, _PIP if command.startswith("pip install") else "")
        yield Finding("ONNX Runtime", state, found, fix)
        return
    names = onnxruntime.get_available_providers()
    providers = [name.removesuffix("ExecutionProvider") for name in names]
    text = f"{onnxruntime.__version__} ({', '.join(providers)})"
    if machine.l4t and "CUDA" not in providers:
        text += "; PyPI has no onnxruntime-gpu for aarch64"
    yield Finding("ONNX Runtime", "ok", text)


def _lerobot(_machine: Machine) -> Iterator[Finding]:
    """Whether LeRobot, where it is installed, will find the plugin."""
    installed = {each.metadata["Name"]: each.version for each in distributions()}
    if lerobot := installed.get("lerobot"):
        # LeRobot goes by the name as its author spelled it, underscores included.
        if _PLUGIN in installed:
            yield Finding("LeRobot", "ok", f"{lerobot}, with {_PLUGIN} {installed[_PLUGIN]}")
        else:
            fix = Fix(f"pip install --force-reinstall {_PLUGIN_FOLDER}", _PLUGIN_DOCS)
            yield Finding("LeRobot", "note", f"{lerobot}, without the plugin '{_PLUGIN}'", fix)


def _power(machine: Machine) -> Iterator[Finding]:
    found = re.search(r"NV Power Mode: (\S+)", machine.output("nvpmodel", "-q"))
    if not machine.l4t or not found:
        return
    # The numbers differ from board to board; the file has them, and the command prints them.
    text = machine.read("etc/nvpmodel.conf") + machine.output("nvpmodel", "-p", "--verbose")
    modes = dict(re.findall(r"POWER_MODEL:? ID=(\d+) NAME=(\w+)", text))
    fastest = max((name for name in modes.values() if name.startswith("MAXN")), key=len, default="")
    if found[1].startswith(fastest or "MAXN"):
        yield Finding("power mode", "ok", found[1])
        return
    number = next((number for number, name in modes.items() if name == fastest), None)
    known = ", ".join(f"{number} {name}" for number, name in modes.items())
    command = f"sudo nvpmodel -m {number}" if number else "nvpmodel -p --verbose  # lists the modes"
    yield Finding("power mode", "note", f"{found[1]} of {known or '?'}", Fix(command, _POWER))


def _clocks(machine: Machine) -> Iterator[Finding]:
    for clock in sorted((machine.root / "sys/class/devfreq").glob("*gpu*")):
        low, high = (int((clock / f"{end}_freq").read_text()) // 10**6 for end in ("min", "max"))
        fix = None if low == high else Fix("sudo jetson_clocks")
        yield Finding("GPU clock", "note" if fix else "ok", f"{low} to {high} MHz", fix)


def _cache(_machine: Machine) -> Iterator[Finding]:
    try:
        place = user_cache()
        existing = next(path for path in (place, *place.parents) if path.is_dir())
        check_folder(existing)
    except (DiskError, RejectedError) as error:
        fix = Fix(f"export {CACHE_VARIABLE}=DIRECTORY", _OURS)
        yield Finding("engine cache", "problem", str(error), fix)
        return
    free = shutil.disk_usage(existing).free
    text = f"{place}, {free / 2**30:.1f} GiB free"
    if free < _NEEDED_BYTES:
        fix = Fix(f"rm -r '{place}'", _OURS)
        yield Finding("engine cache", "note", text, fix)
    else:
        yield Finding("engine cache", "ok", text)
