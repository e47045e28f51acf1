"""CUDA through `cuda-python` (the package `cuda-bindings`)."""

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda import (
    BLOCK_VARIABLE,
    Bytes,
    Cuda,
    Device,
    HostMemory,
    Launch,
    driver_version,
    switch,
)


def _import_driver() -> Any:  # noqa: ANN401
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return importlib.import_module("cuda.cuda")  # before cuda-python 12.8


class CudaPython(Cuda):
    """The driver interface, whose calls return a status and then their results."""

    def __init__(self) -> None:
        self._driver = driver = _import_driver()
        try:
            self._call(driver.cuInit, 0)
        except RuntimeError as error:  # libcuda cannot be loaded
            raise BackendError(f"there is no CUDA driver here: {error}") from error
        device = self._call(driver.cuDeviceGet, 0)
        self._context = self._call(driver.cuDevicePrimaryCtxRetain, device)
        self.make_current()
        self.device = self._describe(device)
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = self._call(driver.cuStreamCreate, int(flags))
        self.stream = int(self._stream)
        events = driver.CUevent_flags
        block = switch(BLOCK_VARIABLE, default=False)
        kind = events.CU_EVENT_BLOCKING_SYNC if block else events.CU_EVENT_DEFAULT
        self._event = self._call(driver.cuEventCreate, int(kind))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
        status, *results = function(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{function.__name__} failed: {status.name}")
        return results[0] if results else None

    def _describe(self, device: Any) -> Device:  # noqa: ANN401
        attribute, call = self._driver.CUdevice_attribute, self._call
        get = self._driver.cuDeviceGetAttribute
        major = call(get, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = call(get, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        integrated = call(get, attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED, device)
        name = call(self._driver.cuDeviceGetName, 256, device)
        return Device(
            name=name.split(b"\0")[0].decode(),
            compute_capability=f"{major}.{minor}",
            driver=driver_version(call(self._driver.cuDriverGetVersion)),
            integrated=bool(integrated),
        )

    def make_current(self) -> None:
        """Let the calling thread use the context."""
        self._call(self._driver.cuCtxSetCurrent, self._context)

    def device_memory(self, size: int) -> int:
        """Allocate zeroed memory on the GPU."""
        address = self._call(self._driver.cuMemAlloc, size)
        self._call(self._driver.cuMemsetD8, address, 0, size)
        return int(address)

    def host_memory(self, size: int) -> HostMemory:
        """Allocate zeroed, page-locked, mapped memory."""
        mapped = self._driver.CU_MEMHOSTALLOC_DEVICEMAP
        pointer = int(self._call(self._driver.cuMemHostAlloc, size, mapped))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        array[:] = 0
        address = int(self._call(self._driver.cuMemHostGetDevicePointer, pointer, 0))
        return HostMemory(array, address)

    def to_device(self, address: int, source: Bytes) -> None:
        """Put a copy to the GPU on the stream."""
        copy = self._driver.cuMemcpyHtoDAsync
        self._call(copy, address, source.ctypes.data, source.nbytes, self._stream)

    def to_host(self, target: Bytes, address: int) -> None:
        """Put a copy from the GPU on the stream."""
        copy = self._driver.cuMemcpyDtoHAsync
        self._call(copy, target.ctypes.data, address, target.nbytes, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy within the GPU on the stream."""
        self._call(self._driver.cuMemcpyDtoDAsync, target, source, size, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call(self._driver.cuEventRecord, self._event, self._stream)
        self._call(self._driver.cuEventSynchronize, self._event)

    def capture(self, enqueue: Launch) -> Launch:
        """Record a CUDA graph."""
        driver, call = self._driver, self._call
        # Other threads of the robot's process may use CUDA meanwhile.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver.cuStreamBeginCapture, self._stream, mode)
        enqueue()
        graph = call(driver.cuStreamEndCapture, self._stream)
        executable = call(driver.cuGraphInstantiate, graph, 0)
        return lambda: call(driver.cuGraphLaunch, executable, self._stream)
