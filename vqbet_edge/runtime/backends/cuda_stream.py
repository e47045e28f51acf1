"""A CUDA stream, and the memory and graphs that live as long as it does."""

import ctypes
import functools
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda import Cuda, switch

Bytes = NDArray[np.uint8]
Launch = Callable[[], None]

MAPPED_VARIABLE = "VQBET_EDGE_MAPPED_MEMORY"
BLOCK_VARIABLE = "VQBET_EDGE_BLOCKING_SYNC"
_LOG = logging.getLogger(__name__)
# Garbage collection is switched off for the whole process, so one capture at a time.
_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class Buffer:
    """A tensor's memory, zeroed, at one address for as long as its stream is open.

    `host` is uint8 (bytes,), page-locked; None for a tensor that stays on the GPU. `mapped`: the
    address is `host` itself, so nothing is copied.
    """

    address: int
    host: Bytes | None
    mapped: bool


class Stream:
    """A stream in the device's primary context, and all that was created for it.

    One thread at a time uses a stream; several streams may be used at the same time. Everything is
    freed by `close`, or when nobody holds the stream any more, in the reverse order of creation.
    Whoever creates, copies or waits does so inside `active`.

    Raises:
        BackendError: the context or the stream cannot be created.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._call = cuda, cuda.call
        blocking = switch(BLOCK_VARIABLE, default=False)
        # Whether waits spin or sleep is the context's to say, and said before it is there.
        _, active = self._call("cuDevicePrimaryCtxGetState", cuda.ordinal)
        if not active:  # else it is another library's, and the event's own flag has to do
            waits = cuda.driver.CUctx_flags
            kind = waits.CU_CTX_SCHED_BLOCKING_SYNC if blocking else waits.CU_CTX_SCHED_SPIN
            self._call("cuDevicePrimaryCtxSetFlags", cuda.ordinal, int(kind))
        self._context = self._call("cuDevicePrimaryCtxRetain", cuda.ordinal)
        self._created = ExitStack()
        self._finalizer = weakref.finalize(self, _free, cuda, self._context, self._created)
        # At a process's end the driver frees what is left, and threads may still be using it.
        self._finalizer.atexit = False
        try:
            with self.active():
                flags, events = cuda.driver.CUstream_flags, cuda.driver.CUevent_flags
                self._stream = self._create(
                    "cuStreamDestroy", "cuStreamCreate", int(flags.CU_STREAM_NON_BLOCKING)
                )
                kind = int(events.CU_EVENT_DISABLE_TIMING)
                kind |= int(events.CU_EVENT_BLOCKING_SYNC) if blocking else 0
                self._event = self._create("cuEventDestroy", "cuEventCreate", kind)
            # What is created later is freed after a last wait and before the stream.
            content = ExitStack()
            self._created.callback(content.close)
            self._created.callback(cuda.release, "cuStreamSynchronize", self._stream)
            self._created = content
        except BaseException:
            self.close()
            raise
        #: As TensorRT and ONNX Runtime take it.
        self.handle = int(self._stream)

    def close(self) -> None:
        """Wait for the stream and free everything; nothing when it is closed."""
        self._finalizer()

    def active(self) -> AbstractContextManager[None]:
        """Let this thread use the context, and give its own back to it afterwards."""
        return _pushed(self._cuda, self._context)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call it before what has been created until now is freed; it must not hold the stream."""
        self._created.callback(callback)

    def settle(self) -> None:
        """Wait, whatever may have failed; nothing when the stream is closed."""
        if self._finalizer.alive:
            self._cuda.release("cuStreamSynchronize", self._stream)

    def buffer(self, size: int, *, host: bool) -> Buffer:
        """Memory for a tensor of `size` bytes, with a `host` side or without."""
        if not host:
            return Buffer(self._device_memory(size), None, mapped=False)
        mapped = switch(MAPPED_VARIABLE, self._cuda.device.integrated)
        flag = self._cuda.driver.CU_MEMHOSTALLOC_DEVICEMAP
        pointer = int(self._create("cuMemFreeHost", "cuMemHostAlloc", size, flag))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        array[:] = 0
        if mapped:
            address = int(self._call("cuMemHostGetDevicePointer", pointer, 0))
        else:
            address = self._device_memory(size)
        return Buffer(address, array, mapped)

    def _device_memory(self, size: int) -> int:
        address = int(self._create("cuMemFree", "cuMemAlloc", size))
        # On the stream, which does not wait for what the default stream does.
        self._call("cuMemsetD8Async", address, 0, size, self._stream)
        return address

    def _create(self, destroy: str, create: str, *arguments: Any) -> Any:  # noqa: ANN401
        created = self._call(create, *arguments)
        self._created.callback(self._cuda.release, destroy, created)
        return created

    def upload(self, buffer: Buffer) -> None:
        """Put a buffer's copy to the GPU on the stream; nothing when it is mapped."""
        if (host := buffer.host) is not None and not buffer.mapped:
            source = host.ctypes.data
            self._call("cuMemcpyHtoDAsync", buffer.address, source, host.nbytes, self._stream)

    def download(self, buffer: Buffer) -> None:
        """Put a buffer's copy to the host on the stream; nothing when it is mapped."""
        if (host := buffer.host) is not None and not buffer.mapped:
            target = host.ctypes.data
            self._call("cuMemcpyDtoHAsync", target, buffer.address, host.nbytes, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy within the GPU on the stream; the ranges must not overlap."""
        self._call("cuMemcpyDtoDAsync", target, source, size, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises:
            BackendError: something on it failed.
        """
        self._call("cuEventRecord", self._event, self._stream)
        self._call("cuEventSynchronize", self._event)

    def capture(self, enqueue: Launch) -> Launch:
        """Record what `enqueue` puts on the stream as a CUDA graph; the result launches it.

        Raises:
            BackendError: it cannot be captured; the stream is usable as before.
        """
        # Other threads of the robot's process may use CUDA meanwhile.
        mode = self._cuda.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with _no_garbage_collection():
            self._call("cuStreamBeginCapture", self._stream, mode)
            try:
                enqueue()
            except BaseException:
                # It takes the stream out of its capture even when it fails, as after most errors.
                status, graph = self._cuda.driver.cuStreamEndCapture(self._stream)
                if not status:
                    self._cuda.release("cuGraphDestroy", graph)
                raise
            graph = self._call("cuStreamEndCapture", self._stream)
        try:
            executable = self._create("cuGraphExecDestroy", "cuGraphInstantiate", graph, 0)
        finally:
            self._cuda.release("cuGraphDestroy", graph)
        return functools.partial(self._call, "cuGraphLaunch", executable, self._stream)


def _free(cuda: Cuda, context: Any, created: ExitStack) -> None:  # noqa: ANN401
    try:
        with _pushed(cuda, context):
            created.close()
    except BackendError as error:
        # The context is gone, and all that was in it; libraries' objects are still to be let go.
        _LOG.debug("%s", error)
        created.close()
    cuda.release("cuDevicePrimaryCtxRelease", cuda.ordinal)


@contextmanager
def _pushed(cuda: Cuda, context: Any) -> Iterator[None]:  # noqa: ANN401
    cuda.call("cuCtxPushCurrent", context)
    try:
        yield
    finally:
        cuda.release("cuCtxPopCurrent")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Garbage may be another library's GPU memory, and freeing that would spoil a capture."""
    with _CAPTURING:
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()
