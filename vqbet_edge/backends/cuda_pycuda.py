"""CUDA through `pycuda`, and through the driver's library for CUDA graphs, which pycuda lacks."""

import ctypes
import importlib
import threading
from typing import Any

import numpy as np

from vqbet_edge.backends.cuda import (
    BLOCK_VARIABLE,
    Bytes,
    Cuda,
    Device,
    HostMemory,
    Launch,
    driver_version,
    switch,
)
from vqbet_edge.errors import BackendError

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, cuda.h


class PyCuda(Cuda):
    """pycuda's driver interface; its objects free themselves, so all are kept."""

    def __init__(self) -> None:
        self._driver = driver = importlib.import_module("pycuda.driver")
        try:
            driver.init()
            device = driver.Device(0)
        except driver.Error as error:
            raise BackendError(f"there is no usable GPU: {error}") from error
        self._context = device.retain_primary_context()
        self._threads: set[int] = set()
        self.make_current()
        self.device = Device(
            name=device.name(),
            compute_capability="{}.{}".format(*device.compute_capability()),
            driver=driver_version(driver.get_driver_version()),
            integrated=bool(device.get_attribute(driver.device_attribute.INTEGRATED)),
        )
        self._stream = driver.Stream(1)  # CU_STREAM_NON_BLOCKING: pycuda has no name for it
        self.stream = int(self._stream.handle)
        flags = driver.event_flags
        block = switch(BLOCK_VARIABLE, default=False)
        self._event = driver.Event(flags.BLOCKING_SYNC if block else flags.DEFAULT)
        self._library = ctypes.CDLL("libcuda.so.1")
        self._kept: list[Any] = []

    def make_current(self) -> None:
        """Let the calling thread use the context; pushing it once a thread is enough."""
        if threading.get_ident() not in self._threads:
            self._context.push()
            self._threads.add(threading.get_ident())

    def device_memory(self, size: int) -> int:
        """Allocate zeroed memory on the GPU."""
        memory = self._driver.mem_alloc(size)
        self._kept.append(memory)
        self._driver.memset_d8(memory, 0, size)
        return int(memory)

    def host_memory(self, size: int) -> HostMemory:
        """Allocate zeroed, page-locked, mapped memory."""
        mapped = self._driver.host_alloc_flags.DEVICEMAP
        array = self._driver.pagelocked_zeros(size, np.uint8, mem_flags=mapped)
        return HostMemory(array, int(array.base.get_device_pointer()))

    def to_device(self, address: int, source: Bytes) -> None:
        """Put a copy to the GPU on the stream."""
        self._driver.memcpy_htod_async(address, source, self._stream)

    def to_host(self, target: Bytes, address: int) -> None:
        """Put a copy from the GPU on the stream."""
        self._driver.memcpy_dtoh_async(target, address, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy within the GPU on the stream."""
        self._driver.memcpy_dtod_async(target, source, size, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._event.record(self._stream)
        self._event.synchronize()

    def capture(self, enqueue: Launch) -> Launch:
        """Record a CUDA graph."""
        stream = ctypes.c_void_p(self.stream)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", stream, ctypes.c_int(_THREAD_LOCAL))
        enqueue()
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        flags = ctypes.c_ulonglong(0)
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, flags)
        return lambda: self._call("cuGraphLaunch", executable, stream)

    def _call(self, function: str, *arguments: Any) -> None:  # noqa: ANN401
        status = getattr(self._library, function)(*arguments)
        if status:
            raise BackendError(f"{function} failed with CUDA error {status}")
