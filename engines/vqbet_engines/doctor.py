"""`vqbet-doctor`: what is installed here, what is missing, and the command that mends it."""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from vqbet_edge.cli import run
from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda import create_cuda
from vqbet_edge.runtime.backends.private_files import user_cache
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
from vqbet_engines.boards import JetPack, jetpack_releases, match_board

_NEEDED_BYTES = 1 << 30  # four engines, their timing cache, and room to replace them
_LEAST = {"numpy": (1, 24), "msgspec": (0, 18)}
_PLUGIN = "lerobot_policy_vqbet_edge"


class Finding(Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `problem` stops the robot or the build, `note` makes it slower than it could be.
        value: what was found.
        mend: the command that mends it; empty when there is nothing to mend.
    """

    name: str
    state: Literal["ok", "note", "problem"]
    value: str
    mend: str = ""


@dataclass(frozen=True)
class Machine:
    """Where to look; tests look elsewhere."""

    root: Path = Path("/")

    def read(self, path: str) -> str | None:
        """Text of a file without the device tree's trailing NUL; None when there is none."""
        file = self.root / path
        return file.read_text().strip("\0\n ") if file.is_file() else None

    def output(self, *command: str) -> str | None:
        """Standard output of a command; None when it is missing or fails."""
        if shutil.which(command[0]) is None:
            return None
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return None if done.returncode else done.stdout.strip()

    @property
    def l4t(self) -> str | None:
        """Version of Jetson Linux, such as "36.4.3"; None elsewhere."""
        text = self.read("etc/nv_tegra_release") or ""
        found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
        return f"{found[1]}.{found[2]}" if found else None

    @property
    def jetpack(self) -> JetPack | None:
        """The JetPack release that Jetson Linux belongs to."""
        l4t = self.l4t or ""
        fitting = [r for r in jetpack_releases() if f"{l4t}.".startswith(f"{r.l4t}.")]
        return max(fitting, key=lambda release: len(release.l4t)) if fitting else None


def examine(machine: Machine) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    checks: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
        _board, _python, _packages, _tensorrt, _gpu, _onnxruntime, _lerobot, _power, _disk,
    )  # fmt: skip
    return [finding for check in checks for finding in check(machine)]


def _board(machine: Machine) -> Iterator[Finding]:
    model = machine.read("proc/device-tree/model")
    if model is None or machine.l4t is None:
        yield Finding("board", "ok", f"{platform.machine()}, no Jetson")
        return
    memory = machine.read("proc/meminfo") or "MemTotal: 0 kB"
    gigabytes = int(memory.split("MemTotal:")[1].split()[0]) / 1e6
    name = match_board(model, gigabytes)
    yield Finding("board", "ok" if name else "note", f"{model}, profile: {name or 'none'}")
    release = machine.jetpack
    if release is None:
        yield Finding("JetPack", "note", f"Jetson Linux {machine.l4t} is not known here")
    elif release.tensorrt.startswith("8.5"):
        mend = "flash JetPack 6.2 or newer with NVIDIA SDK Manager"
        yield Finding("JetPack", "problem", f"{release.version}: TensorRT is too old", mend)
    else:
        yield Finding("JetPack", "ok", f"{release.version} (Jetson Linux {machine.l4t})")


def _python(machine: Machine) -> Iterator[Finding]:
    text = platform.python_version()
    isolated = sys.prefix != sys.base_prefix and "include-system-site-packages = true" not in (
        (Path(sys.prefix) / "pyvenv.cfg").read_text()
    )
    if machine.l4t is not None and isolated:
        mend = "python3 -m venv --system-site-packages .venv"
        yield Finding("Python", "note", f"{text}, in an environment without JetPack's", mend)
    else:
        yield Finding("Python", "ok", text)


def _packages(_machine: Machine) -> Iterator[Finding]:
    for name, least in _LEAST.items():
        try:
            text = version(name)
        except PackageNotFoundError:
            yield Finding(name, "problem", "missing", f"pip install {name}")
            continue
        new_enough = tuple(map(int, re.findall(r"\d+", text)[:2])) >= least
        wanted = ".".join(map(str, least))
        mend = "" if new_enough else f"pip install '{name}>={wanted}'"
        yield Finding(name, "ok" if new_enough else "problem", text, mend)


def _tensorrt(machine: Machine) -> Iterator[Finding]:
    try:
        tensorrt = import_tensorrt()
    except BackendError as error:
        jetson = machine.l4t is not None
        mend = "sudo apt install nvidia-jetpack" if jetson else "pip install tensorrt"
        yield Finding("TensorRT", "problem" if jetson else "note", str(error), mend)
        return
    text = f"{tensorrt.flavour} {tensorrt.version}"
    release = machine.jetpack
    expected = release.tensorrt.rsplit(".", 1)[0] if release else ""
    if tensorrt.strongly_typed and tensorrt.version.startswith(expected):
        yield Finding("TensorRT", "ok", text)
    elif not tensorrt.strongly_typed:
        mend = "flash JetPack 6.2 or newer with NVIDIA SDK Manager"
        yield Finding("TensorRT", "note", f"{text}: not strongly typed, best effort", mend)
    else:
        yield Finding("TensorRT", "note", f"{text}; this JetPack brings {expected}")


def _gpu(machine: Machine) -> Iterator[Finding]:
    try:
        device = create_cuda().device
    except BackendError as error:
        jetson = machine.l4t is not None
        old = jetson and (machine.l4t or "").startswith("36.")
        mend = "pip install pycuda" if old else "pip install cuda-bindings"
        mend = mend if "no CUDA library" in str(error) else ""
        yield Finding("CUDA", "problem" if jetson else "note", str(error), mend)
        return
    kind = "integrated" if device.integrated else "discrete"
    text = f"{device.name} (compute capability {device.compute_capability}, {kind})"
    yield Finding("GPU", "ok", text)
    yield Finding("CUDA driver", "ok", device.driver)


def _onnxruntime(machine: Machine) -> Iterator[Finding]:
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError:
        state: Literal["note", "problem"] = "note" if machine.l4t is not None else "problem"
        yield Finding("ONNX Runtime", state, "missing", "pip install 'vqbet-edge[cpu]'")
        return
    providers = [name.removesuffix("ExecutionProvider") for name in _providers(onnxruntime)]
    yield Finding("ONNX Runtime", "ok", f"{onnxruntime.__version__} ({', '.join(providers)})")


def _providers(onnxruntime: object) -> list[str]:
    names: list[str] = onnxruntime.get_available_providers()  # type: ignore[attr-defined]
    return names


def _lerobot(_machine: Machine) -> Iterator[Finding]:
    """Whether LeRobot, where it is installed, will find the plugin: it goes by the name."""
    try:
        lerobot = version("lerobot")
    except PackageNotFoundError:
        return
    install = f"pip install --force-reinstall {_PLUGIN}"
    names = [str(found.metadata["Name"]) for found in distributions()]
    spelled = [name for name in names if re.sub(r"[-_.]+", "_", name).lower() == _PLUGIN]
    if not spelled:
        text = f"{lerobot}, without the plugin for bundles"
        yield Finding("LeRobot", "note", text, f"pip install {_PLUGIN}")
    elif not any(name.startswith("lerobot_policy_") for name in spelled):
        text = f"{lerobot} skips '{spelled[0]}': its name must start with lerobot_policy_"
        yield Finding("LeRobot", "problem", text, install)
    else:
        yield Finding("LeRobot", "ok", f"{lerobot}, with {_PLUGIN} {version(_PLUGIN)}")


def _power(machine: Machine) -> Iterator[Finding]:
    if machine.l4t is None:
        return
    mode = machine.output("nvpmodel", "-q")
    if mode is not None:
        name = mode.split("NV Power Mode:")[-1].split("\n")[0].strip()
        fast = name.startswith("MAXN")
        mend = "" if fast else "sudo nvpmodel -m 0  # or the mode of 'nvpmodel -q --verbose'"
        yield Finding("power mode", "ok" if fast else "note", name, mend)
    for clock in sorted((machine.root / "sys/class/devfreq").glob("*gpu*")):
        low, high = (int((clock / f"{end}_freq").read_text()) // 10**6 for end in ("min", "max"))
        mend = "" if low == high else "sudo jetson_clocks"
        state: Literal["ok", "note"] = "ok" if low == high else "note"
        yield Finding("GPU clock", state, f"{low} to {high} MHz", mend)


def _disk(_machine: Machine) -> Iterator[Finding]:
    place = user_cache()
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    state: Literal["ok", "note"] = "ok" if free >= _NEEDED_BYTES else "note"
    mend = "" if state == "ok" else f"rm -r '{place}'"
    yield Finding("engine cache", state, f"{place}, {free / 2**30:.1f} GiB free", mend)


@dataclass(frozen=True)
class DoctorArguments:
    """Say what is installed here, what is missing, and the command that mends it."""

    # Print the findings as JSON.
    json: bool = False


def _report() -> None:
    import tyro  # noqa: PLC0415 - may be missing, and `run` says so
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    arguments = tyro.cli(DoctorArguments, prog="vqbet-doctor")
    findings = examine(Machine())
    if arguments.json:
        text = msgspec.json.format(msgspec.json.encode(findings), indent=2).decode()
        sys.stdout.write(text + "\n")
    else:
        table = Table("what", "", "found", "to mend it")
        for finding in findings:
            table.add_row(finding.name, finding.state, finding.value, finding.mend)
        Console().print(table)
    problems = [finding.name for finding in findings if finding.state == "problem"]
    if problems:
        raise BackendError(f"problems with {', '.join(problems)}; see the commands that mend them")


def main() -> None:
    """Entry point of `vqbet-doctor`."""
    run(_report)
