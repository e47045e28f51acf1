"""The few CUDA calls that a backend needs, through `cuda-python` or `pycuda`.

Two libraries, because neither is everywhere: cuda-python 13 needs CUDA 13 and Python 3.11, which
JetPack 6 has not; pycuda has no wheel and needs the CUDA compiler, which JetPack has.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import BackendError

Bytes = NDArray[np.uint8]
Launch = Callable[[], None]

GRAPH_VARIABLE = "VQBET_EDGE_CUDA_GRAPH"
MAPPED_VARIABLE = "VQBET_EDGE_MAPPED_MEMORY"
BLOCK_VARIABLE = "VQBET_EDGE_BLOCKING_SYNC"
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def switch(variable: str, default: bool) -> bool:
    """An environment switch: 0 turns it off, 1 on, unset leaves the default.

    Raises:
        BackendError: it has another value.
    """
    match os.environ.get(variable, ""):
        case "":
            return default
        case "0":
            return False
        case "1":
            return True
        case other:
            raise BackendError(f"expected {variable} to be 0 or 1, got '{other}'")


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as the driver reports it.
        compute_capability: such as "8.7".
        driver: CUDA version of the driver, and the kernel module's where it tells.
        integrated: whether GPU and processor share their memory.
    """

    name: str
    compute_capability: str
    driver: str
    integrated: bool


@dataclass(frozen=True)
class HostMemory:
    """Page-locked memory: uint8 (bytes,), and its address for the GPU when it is mapped."""

    array: Bytes
    device_address: int


@dataclass(frozen=True)
class Buffer:
    """A tensor's memory, at one address for ever.

    Attributes:
        address: for the GPU.
        host: uint8 (bytes,), page-locked; None for a tensor that stays on the GPU.
        mapped: `address` is `host` itself, so nothing is copied.
    """

    address: int
    host: Bytes | None
    mapped: bool


class Cuda(ABC):
    """Device 0, its primary context, and one stream on which everything is put in order."""

    device: Device
    #: The stream's handle, as TensorRT and ONNX Runtime take it.
    stream: int

    @abstractmethod
    def make_current(self) -> None:
        """Let the calling thread use the context."""

    @abstractmethod
    def device_memory(self, size: int) -> int:
        """Allocate `size` bytes on the GPU, zeroed; the process's end frees them."""

    @abstractmethod
    def host_memory(self, size: int) -> HostMemory:
        """Allocate `size` page-locked, mapped bytes, zeroed."""

    @abstractmethod
    def to_device(self, address: int, source: Bytes) -> None:
        """Put a copy to the GPU on the stream."""

    @abstractmethod
    def to_host(self, target: Bytes, address: int) -> None:
        """Put a copy from the GPU on the stream."""

    @abstractmethod
    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy within the GPU on the stream; the ranges must not overlap."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the stream."""

    @abstractmethod
    def capture(self, enqueue: Launch) -> Launch:
        """Record what `enqueue` puts on the stream as a CUDA graph; the result launches it."""

    def buffer(self, size: int, *, host: bool) -> Buffer:
        """Memory for a tensor of `size` bytes, with a `host` side or without."""
        if not host:
            return Buffer(self.device_memory(size), None, mapped=False)
        memory = self.host_memory(size)
        if switch(MAPPED_VARIABLE, self.device.integrated):
            return Buffer(memory.device_address, memory.array, mapped=True)
        return Buffer(self.device_memory(size), memory.array, mapped=False)

    def upload(self, buffer: Buffer) -> None:
        """Put a buffer's copy to the GPU on the stream; nothing when it is mapped."""
        if buffer.host is not None and not buffer.mapped:
            self.to_device(buffer.address, buffer.host)

    def download(self, buffer: Buffer) -> None:
        """Put a buffer's copy to the host on the stream; nothing when it is mapped."""
        if buffer.host is not None and not buffer.mapped:
            self.to_host(buffer.host, buffer.address)


def create_cuda(library: Literal["cuda-python", "pycuda"] | None = None) -> Cuda:
    """Open device 0 with the CUDA library that is installed.

    Raises:
        BackendError: none is installed, or there is no GPU or driver.
    """
    from vqbet_edge.runtime.backends.cuda_pycuda import PyCuda  # noqa: PLC0415
    from vqbet_edge.runtime.backends.cuda_python import CudaPython  # noqa: PLC0415

    match library:
        case "cuda-python":
            return CudaPython()
        case "pycuda":
            return PyCuda()
        case None:
            try:
                return CudaPython()
            except ImportError as error:
                first = error
            try:
                return PyCuda()
            except ImportError as error:
                raise BackendError(
                    f"no CUDA library for Python is usable ({first}; {error}); install one with: "
                    "pip install cuda-bindings (JetPack 7, x86) or: pip install pycuda (JetPack 6)"
                ) from error


def driver_version(cuda_version: int) -> str:
    """CUDA's version as the driver counts it (12060) and the kernel module's, as one text."""
    text = f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"
    if _KERNEL_MODULE.exists():
        found = re.search(r"\d+\.\d+(\.\d+)?", _KERNEL_MODULE.read_text())
        text += f" ({found[0]})" if found else ""
    return text
