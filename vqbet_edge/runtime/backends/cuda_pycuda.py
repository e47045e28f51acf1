"""CUDA through `pycuda`, and through the driver's library for CUDA graphs, which pycuda lacks."""

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
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

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, cuda.h


class PyCuda(Cuda):
    """pycuda's driver interface; its objects free themselves, so all are kept.

    pycuda keeps a stack of contexts per thread and aborts the process when a thread ends with one
    on it. So nothing stays there: it is filled for as long as pycuda creates an object, which is
    all that asks for it, and what runs later uses the context that the driver knows.
    """

    def __init__(self) -> None:
        self._driver = driver = importlib.import_module("pycuda.driver")
        self._kept: list[Any] = []
        try:
            driver.init()
            device = driver.Device(0)
            self._library = ctypes.CDLL("libcuda.so.1")
        except (driver.Error, OSError) as error:
            raise BackendError(f"there is no usable GPU: {error}; see vqbet-doctor") from error
        with self._naming("opening the GPU"):
            self._context = device.retain_primary_context()
            self.device = self._describe(device)
        # Retained a second time, and never released: the handle stays good to the process's end.
        self._handle = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._handle), ctypes.c_int(0))
        self.make_current()
        block = switch(BLOCK_VARIABLE, default=False)
        flags = driver.event_flags
        with self._creating("creating a stream and an event"):
            self._stream = driver.Stream(1)  # CU_STREAM_NON_BLOCKING: pycuda has no name for it
            self._event = driver.Event(flags.BLOCKING_SYNC if block else flags.DEFAULT)
        self.stream = int(self._stream.handle)

    def _describe(self, device: Any) -> Device:  # noqa: ANN401
        driver = self._driver
        return Device(
            name=device.name(),
            compute_capability="{}.{}".format(*device.compute_capability()),
            driver=driver_version(driver.get_driver_version()),
            integrated=bool(device.get_attribute(driver.device_attribute.INTEGRATED)),
        )

    @contextmanager
    def _naming(self, operation: str) -> Iterator[None]:
        """Turn pycuda's errors into ours, so that `auto` can take the next backend."""
        try:
            yield
        except (self._driver.Error, MemoryError) as error:
            raise BackendError(f"{operation} failed: {error}; see vqbet-doctor") from error

    @contextmanager
    def _creating(self, operation: str) -> Iterator[None]:
        """As `_naming`, with the context on pycuda's stack, where its objects look for it."""
        with self._naming(operation):
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()

    def make_current(self) -> None:
        """Let the calling thread use the context."""
        self._call("cuCtxSetCurrent", self._handle)

    def device_memory(self, size: int) -> int:
        """Allocate zeroed memory on the GPU."""
        with self._creating(f"allocating {size} bytes on the GPU"):
            memory = self._driver.mem_alloc(size)
            self._kept.append(memory)
            self._driver.memset_d8(memory, 0, size)
        return int(memory)

    def host_memory(self, size: int) -> HostMemory:
        """Allocate zeroed, page-locked, mapped memory."""
        mapped = self._driver.host_alloc_flags.DEVICEMAP
        with self._creating(f"allocating {size} page-locked bytes"):
            array = self._driver.pagelocked_zeros(size, np.uint8, mem_flags=mapped)
            return HostMemory(array, int(array.base.get_device_pointer()))

    def to_device(self, address: int, source: Bytes) -> None:
        """Put a copy to the GPU on the stream."""
        with self._naming("copying to the GPU"):
            self._driver.memcpy_htod_async(address, source, self._stream)

    def to_host(self, target: Bytes, address: int) -> None:
        """Put a copy from the GPU on the stream."""
        with self._naming("copying from the GPU"):
            self._driver.memcpy_dtoh_async(target, address, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy within the GPU on the stream."""
        with self._naming("copying within the GPU"):
            self._driver.memcpy_dtod_async(target, source, size, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        with self._naming("waiting for the GPU"):
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
            raise BackendError(f"{function} failed with CUDA error {status}; see vqbet-doctor")
