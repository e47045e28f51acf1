# ruff: noqa: N802 - the functions have the names that the driver gives them
"""A CUDA driver in host memory, with the interface of `cuda.bindings.driver`.

What is put on a stream runs when the stream is waited for, so a forgotten copy or wait shows as a
wrong number. It keeps books of what exists, refuses what a GPU refuses (no context, a context of
somebody else's, allocating or waiting inside a capture, overlapping copies), notes every use of
memory that has been freed, and fails at any call when told to.
"""

import ctypes
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

Operation = Callable[[], object]

PRIMARY, OTHERS = 0xC0DE, 0xCA11  # contexts: ours and a robot program's own


class CUresult(IntEnum):
    """As in cuda.h."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = (CUresult.CUDA_SUCCESS,)


class RefusedError(Exception):
    """Ends a call with a status."""


def call(function: Any = None, *, anywhere: bool = False, captured: bool = True) -> Any:
    """A function of the driver's: counted, and failing when told to.

    `anywhere` needs no context; without `captured` it spoils a capture of the calling thread.
    """
    if function is None:
        return functools.partial(call, anywhere=anywhere, captured=captured)

    @functools.wraps(function)
    def checked(self: "FakeDriver", *arguments: Any) -> tuple[Any, ...]:
        with self.lock:
            try:
                self.begin(function.__name__, anywhere, captured)
                result = function(self, *arguments)
            except RefusedError as refused:
                # As the bindings: the results are there, and are nothing.
                return (refused.args[0], None, None)
            return (
                OK
                if result is None
                else (*OK, *(result if isinstance(result, tuple) else (result,)))
            )

    return checked


class FakeStream:
    """Operations in order, or those of the graph that is being captured."""

    def __init__(self) -> None:
        self.pending: list[Operation] = []
        self.capture: list[Operation] | None = None
        self.thread: int | None = None
        self.spoiled = False


class FakeDriver:
    """The driver, one device and one process."""

    CUresult = CUresult
    CU_MEMHOSTALLOC_DEVICEMAP = 2
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_INTEGRATED=18,
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_BLOCKING_SYNC=1, CU_EVENT_DISABLE_TIMING=2)
    CUctx_flags = SimpleNamespace(CU_CTX_SCHED_SPIN=1, CU_CTX_SCHED_BLOCKING_SYNC=4)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, *, integrated: bool = False) -> None:
        self.integrated = integrated
        self.names = [b"Orin"]
        self.lock = threading.RLock()
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        #: Number of the call that fails -> how.
        self.faults: dict[int, CUresult] = {}
        self.contexts = threading.local()
        self.retained = 0
        self.flags = 0
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, FakeStream] = {}
        self.events: dict[int, Any] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.executables: dict[int, list[Operation]] = {}
        #: Uses of what does not exist any more.
        self.misuses: list[str] = []
        self.broken: CUresult | None = None
        self._handles = itertools.count(100)

    # What tests ask and tell.

    @property
    def books(self) -> dict[str, int]:
        """How much of everything exists."""
        kinds = ("memory", "streams", "events", "graphs", "executables")
        return {"contexts": self.retained} | {kind: len(getattr(self, kind)) for kind in kinds}

    @property
    def stack(self) -> list[int]:
        """The calling thread's contexts."""
        if not hasattr(self.contexts, "stack"):
            self.contexts.stack = []
        stack: list[int] = self.contexts.stack
        return stack

    def put(self, stream: int, operation: Operation) -> None:
        """Put work on a stream, as a library does that launches kernels."""
        with self.lock:
            where = self.stream(stream)
            (where.pending if where.capture is None else where.capture).append(operation)

    def capturing(self) -> FakeStream | None:
        """The stream that the calling thread captures."""
        me = threading.get_ident()
        found = [s for s in self.streams.values() if s.capture is not None and s.thread == me]
        return found[0] if found else None

    def begin(self, name: str, anywhere: bool, captured: bool) -> None:
        self.calls[name] += 1
        self.log.append(name)
        if len(self.log) in self.faults:
            if name == "cuStreamEndCapture":  # ends it even when it fails
                self.capturing().capture = None
            raise RefusedError(self.faults[len(self.log)])
        if not anywhere:
            if not self.stack or self.stack[-1] != PRIMARY or not self.retained:
                raise RefusedError(CUresult.CUDA_ERROR_INVALID_CONTEXT)
            if self.broken is not None:
                raise RefusedError(self.broken)
        capture = self.capturing()
        if capture is not None and not captured:
            capture.spoiled = True
            raise RefusedError(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def stream(self, handle: int) -> FakeStream:
        if handle not in self.streams:
            self.misuses.append(f"stream {handle}")
            raise RefusedError(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return self.streams[handle]

    def check_memory(self, address: int, size: int) -> None:
        if not any(a <= address and address + size <= a + m.nbytes for a, m in self.memory.items()):
            self.misuses.append(f"{size} bytes at {address}")
            raise RefusedError(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def handle(self, books: dict[int, Any], what: Any) -> int:
        handle = next(self._handles)
        books[handle] = what
        return handle

    def forget(self, books: dict[int, Any], handle: int) -> None:
        if books.pop(handle, None) is None:
            self.misuses.append(f"freeing {handle}")
            raise RefusedError(CUresult.CUDA_ERROR_INVALID_HANDLE)

    def wait(self, stream: FakeStream) -> None:
        if stream.capture is not None:
            stream.spoiled = True
            raise RefusedError(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        operations, stream.pending = stream.pending, []
        for operation in operations:
            try:
                operation()
            except RefusedError as refused:  # noqa: PERF203
                self.broken = refused.args[0]
                raise

    # Device and context.

    @call(anywhere=True)
    def cuInit(self, _flags: int) -> None: ...

    @call(anywhere=True)
    def cuDriverGetVersion(self) -> int:
        return 12060

    @call(anywhere=True)
    def cuDeviceGetCount(self) -> int:
        return len(self.names)

    @call(anywhere=True)
    def cuDeviceGet(self, ordinal: int) -> int:
        if ordinal >= len(self.names):
            raise RefusedError(CUresult.CUDA_ERROR_NO_DEVICE)
        return ordinal

    @call(anywhere=True)
    def cuDeviceGetName(self, size: int, device: int) -> bytes:
        return self.names[device].ljust(size, b"\0")

    @call(anywhere=True)
    def cuDeviceGetAttribute(self, attribute: int, _device: int) -> int:
        return {75: 8, 76: 7, 18: int(self.integrated)}[attribute]

    @call(anywhere=True)
    def cuDevicePrimaryCtxGetState(self, _device: int) -> tuple[int, int]:
        return self.flags, int(self.retained > 0)

    @call(anywhere=True)
    def cuDevicePrimaryCtxSetFlags(self, _device: int, flags: int) -> None:
        self.flags = flags

    @call(anywhere=True, captured=False)
    def cuDevicePrimaryCtxRetain(self, _device: int) -> int:
        self.retained += 1
        return PRIMARY

    @call(anywhere=True)
    def cuDevicePrimaryCtxRelease(self, _device: int) -> None:
        if not self.retained:
            self.misuses.append("releasing a context that is not held")
        self.retained -= 1

    @call(anywhere=True)
    def cuCtxPushCurrent(self, context: int) -> None:
        if context == PRIMARY and not self.retained:
            raise RefusedError(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.stack.append(context)

    @call(anywhere=True)
    def cuCtxPopCurrent(self) -> int:
        if not self.stack:
            raise RefusedError(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self.stack.pop()

    # Streams and events.

    @call(captured=False)
    def cuStreamCreate(self, flags: int) -> int:
        assert flags == 1
        return self.handle(self.streams, FakeStream())

    @call(captured=False)
    def cuStreamDestroy(self, stream: int) -> None:
        self.forget(self.streams, stream)

    @call
    def cuStreamSynchronize(self, stream: int) -> None:
        self.wait(self.stream(stream))

    @call(captured=False)
    def cuEventCreate(self, flags: int) -> int:
        return self.handle(self.events, SimpleNamespace(flags=flags, stream=None))

    @call
    def cuEventDestroy(self, event: int) -> None:
        self.forget(self.events, event)

    @call
    def cuEventRecord(self, event: int, stream: int) -> None:
        self.events[event].stream = self.stream(stream)

    @call
    def cuEventSynchronize(self, event: int) -> None:
        self.wait(self.events[event].stream)

    # Memory.

    @call(captured=False)
    def cuMemAlloc(self, size: int) -> int:
        # What a GPU hands out is not zero.
        array = np.full(size, 0xA5, np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    @call(captured=False)
    def cuMemFree(self, address: int) -> None:
        self.forget(self.memory, address)

    @call(captured=False)
    def cuMemHostAlloc(self, size: int, flags: int) -> int:
        assert flags == self.CU_MEMHOSTALLOC_DEVICEMAP
        return self.cuMemAlloc.__wrapped__(self, size)  # type: ignore[no-any-return]

    @call(captured=False)
    def cuMemFreeHost(self, address: int) -> None:
        self.forget(self.memory, address)

    @call
    def cuMemHostGetDevicePointer(self, pointer: int, _flags: int) -> int:
        return pointer

    @call
    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> None:
        def fill() -> None:
            self.check_memory(address, size)
            ctypes.memset(address, value, size)

        self.put(stream, fill)

    @call
    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        self.put(stream, lambda: self.copy(target, source, size))

    @call
    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> None:
        self.put(stream, lambda: self.copy(target, source, size))

    @call
    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        assert target + size <= source or source + size <= target, "CUDA does not copy overlaps"
        self.put(stream, lambda: self.copy(target, source, size))

    def copy(self, target: int, source: int, size: int) -> None:
        self.check_memory(target, size)
        self.check_memory(source, size)
        ctypes.memmove(target, source, size)

    # Graphs.

    @call(captured=False)
    def cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert mode == 1
        where = self.stream(stream)
        assert not where.pending, "captured before the warm-up was over"
        where.capture, where.thread, where.spoiled = [], threading.get_ident(), False

    @call
    def cuStreamEndCapture(self, stream: int) -> int:
        where = self.stream(stream)
        if where.capture is None:
            raise RefusedError(CUresult.CUDA_ERROR_INVALID_VALUE)
        recorded, where.capture = where.capture, None
        if where.spoiled:
            raise RefusedError(CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        return self.handle(self.graphs, recorded)

    @call(captured=False)
    def cuGraphInstantiate(self, graph: int, flags: int) -> int:
        assert flags == 0
        return self.handle(self.executables, self.graphs[graph])

    @call
    def cuGraphDestroy(self, graph: int) -> None:
        self.forget(self.graphs, graph)

    @call
    def cuGraphExecDestroy(self, executable: int) -> None:
        self.forget(self.executables, executable)

    @call
    def cuGraphLaunch(self, executable: int, stream: int) -> None:
        if executable not in self.executables:
            self.misuses.append(f"launching {executable}")
            raise RefusedError(CUresult.CUDA_ERROR_INVALID_HANDLE)
        operations = self.executables[executable]
        self.put(stream, lambda: [operation() for operation in operations])
