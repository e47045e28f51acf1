"""Memory of this process, and what it took from the GPU and from the system."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import psutil

from vqbet_bench.results import Memory

_STATUS = Path("/proc/self/status")


class Baseline(NamedTuple):
    """Before the policy was loaded."""

    gpu: int | None
    available: int

    @classmethod
    def take(cls) -> "Baseline":
        """Now."""
        return cls(gpu_used(), psutil.virtual_memory().available)

    def now(self) -> Memory:
        """What has been taken since."""
        resident, gpu = int(psutil.Process().memory_info().rss), gpu_used()
        return Memory(
            resident=resident,
            peak=peak_resident(_STATUS.read_text()) if _STATUS.exists() else resident,
            gpu=None if gpu is None or self.gpu is None else gpu - self.gpu,
            system=self.available - psutil.virtual_memory().available,
        )


def peak_resident(status: str) -> int:
    """Bytes of `VmHWM` in /proc/self/status."""
    return int(status.split("VmHWM:")[1].split(maxsplit=1)[0]) * 1024


def gpu_used() -> int | None:
    """Bytes in use on the first GPU, None without NVML (`nvidia-ml-py`) or a GPU."""
    with contextlib.suppress(Exception):
        import pynvml  # noqa: PLC0415

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    return None
