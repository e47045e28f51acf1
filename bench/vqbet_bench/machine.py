"""The machine, its clocks, and what about them makes figures worth less."""

import gc
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil

from vqbet_bench.power import read_rails, read_text
from vqbet_bench.results import Machine

_CPUS = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_DEVFREQ = Path("/sys/class/devfreq")
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
# What products of matrices run on, as Linux names it; without one for 8 bits, INT8 gains little.
_VECTOR_UNITS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)
_PACKAGES = ("numpy", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch", "lerobot")
# Share of the processor that may be busy before anything is measured.
_MAX_LOAD = 0.1


def describe_machine() -> Machine:
    """Read everything; takes one second, in which the machine should be idle."""
    found = clocks(_CPUS, _DEVFREQ)
    load = psutil.cpu_percent(interval=1) / 100
    facts = {
        "board": read_text(_DEVICE_TREE_MODEL),
        "processor": cpu_field(_CPUINFO, "model name") or platform.machine(),
        "vector units": ", ".join(vector_units(_CPUINFO)),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "power mode": _output("nvpmodel", "-q"),
        "gpu": _output(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"
        ),
        "hottest": hottest(),
        "garbage collector": f"thresholds {gc.get_threshold()}" if gc.isenabled() else "off",
        **{name: _version(name) for name in _PACKAGES},
    }
    return Machine(
        facts={name: value for name, value in facts.items() if value},
        clocks=found,
        warnings=_warnings(found, load),
        idle_watts=read_rails(),
    )


def clocks(cpus: Path, devices: Path) -> dict[str, str]:
    """Governor and range in MHz of every processor and of a Jetson's GPU, where told."""
    found = {p.parent.name: (p, "scaling_", 1e3) for p in sorted(cpus.glob("cpu[0-9]*/cpufreq"))}
    gpus = [p for p in sorted(devices.glob("*")) if "gpu" in p.name or "gv11b" in p.name]
    found |= {gpu.name: (gpu, "", 1e6) for gpu in gpus}
    texts = {}
    for name, (folder, prefix, unit) in found.items():
        files = [folder / f"{prefix}{end}_freq" for end in ("min", "max")]
        low, high = (float(read_text(file) or "nan") / unit for file in files)
        governor = read_text(folder / f"{prefix}governor")
        texts[name] = f"{governor}, {low:.0f} to {high:.0f} MHz"
    return texts


def unlocked(clocks: dict[str, str]) -> list[str]:
    """Clocks that may move: neither the governor `performance` nor a range of one frequency."""
    found = []
    for name, text in clocks.items():
        governor, _, bounds = text.partition(", ")
        low, _, high = bounds.removesuffix(" MHz").partition(" to ")
        if governor != "performance" and low != high:
            found.append(name)
    return found


def _warnings(clocks: dict[str, str], load: float) -> list[str]:
    warnings = []
    if moving := unlocked(clocks):
        warnings.append(
            f"clocks are not locked ({', '.join(moving)}); type: sudo jetson_clocks "
            "(on a Jetson), or set the governor 'performance'"
        )
    if not clocks:
        warnings.append("this machine does not tell its clocks; they may move")
    if load > _MAX_LOAD:
        warnings.append(f"{load:.0%} of the processor was busy before anything was measured")
    return warnings


def cpu_field(cpuinfo: Path, name: str) -> str:
    """A field of the first processor; empty where the kernel does not tell."""
    fields = (line.partition(":") for line in read_text(cpuinfo).splitlines())
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")


def vector_units(cpuinfo: Path) -> list[str]:
    """The processor's instruction sets that decide how fast products of matrices are."""
    flags = cpu_field(cpuinfo, "flags") or cpu_field(cpuinfo, "Features")  # on x86, on ARM
    return [unit for unit in _VECTOR_UNITS if unit in flags.split()]


def hottest() -> str:
    """The highest temperature of any sensor; empty where there is none."""
    zones = Path("/sys/class/thermal").glob("thermal_zone*/temp")
    degrees = [int(text) / 1000 for text in map(read_text, zones) if text.lstrip("-").isdigit()]
    return f"{max(degrees):.0f} C" if degrees else ""


def limit_processors(threads: int) -> None:
    """Keep this process on so many processors, whatever its libraries make of it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return " ".join(done.stdout.split())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
