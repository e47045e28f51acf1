"""`PyCuda` over a stand-in for pycuda and the driver's library, with pycuda's rules for contexts.

pycuda's objects look for the context on a stack of the calling thread's, and a thread that ends
with something on that stack aborts the process.
"""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends import cuda_pycuda
from vqbet_edge.runtime.backends.cuda_pycuda import PyCuda

HANDLE = 0xC0DE


class DriverError(Exception):
    """As `pycuda.driver.Error`."""


class Driver(threading.local):
    """One thread's contexts: pycuda's stack, and what the driver itself takes as current."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.current: int | None = None


class Machine:
    """`pycuda.driver` and `libcuda.so.1`, which share the contexts."""

    def __init__(self) -> None:
        self.contexts = Driver()
        self.failing: tuple[str, Exception] | None = None
        self.Error = DriverError
        self.event_flags = SimpleNamespace(BLOCKING_SYNC=1, DEFAULT=0)
        self.device_attribute = SimpleNamespace(INTEGRATED=1)
        self.host_alloc_flags = SimpleNamespace(DEVICEMAP=2)

    def __getattr__(self, name: str) -> Any:
        """Any other function of pycuda's: fails when told to, needs a current context."""

        def function(*_arguments: Any, **_options: Any) -> Any:
            self.check(name)
            return 4096

        return function

    def check(self, name: str, *, creates: bool = False) -> None:
        if self.failing is not None and self.failing[0] == name:
            raise self.failing[1]
        if creates and not self.contexts.stack:
            raise DriverError(f"{name}: no currently active context?")
        if self.contexts.current is None and not self.contexts.stack:
            raise DriverError(f"{name}: invalid context")

    def init(self) -> None: ...

    def get_driver_version(self) -> int:
        return 12060

    def Device(self, _index: int) -> Any:  # noqa: N802
        return SimpleNamespace(
            name=lambda: "Orin",
            compute_capability=lambda: (8, 7),
            get_attribute=lambda _which: 1,
            retain_primary_context=lambda: SimpleNamespace(
                push=lambda: self.contexts.stack.append(HANDLE), pop=self.contexts.stack.pop
            ),
        )

    def Stream(self, _flags: int) -> Any:  # noqa: N802
        self.check("Stream", creates=True)
        return SimpleNamespace(handle=7)

    def Event(self, _flags: int) -> Any:  # noqa: N802
        self.check("Event", creates=True)
        return SimpleNamespace(record=self.record, synchronize=lambda: None)

    def mem_alloc(self, _size: int) -> int:
        self.check("mem_alloc", creates=True)
        return 4096

    def pagelocked_zeros(self, size: int, dtype: Any, mem_flags: int) -> Any:
        assert mem_flags == 2
        self.check("pagelocked_zeros", creates=True)
        base = SimpleNamespace(get_device_pointer=lambda: 8192)
        return SimpleNamespace(base=base, array=np.zeros(size, dtype))

    # The driver's library.

    def cuDevicePrimaryCtxRetain(self, handle: Any, _device: Any) -> int:  # noqa: N802
        handle._obj.value = HANDLE
        return 0

    def cuCtxSetCurrent(self, handle: Any) -> int:  # noqa: N802
        self.contexts.current = handle.value
        return 0 if handle.value == HANDLE else 201


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(cuda_pycuda.importlib, "import_module", lambda _name: machine)
    monkeypatch.setattr(cuda_pycuda.ctypes, "CDLL", lambda _name: machine)
    return machine


def act(cuda: PyCuda) -> None:
    """What a re-planning step does."""
    cuda.make_current()
    cuda.to_device(1, np.zeros(1, np.uint8))
    cuda.copy(1, 2, 3)
    cuda.to_host(np.zeros(1, np.uint8), 1)
    cuda.synchronize()


def in_a_thread(work: Any) -> Any:
    """Run in a new thread; what it returns, or raises."""
    results: list[Any] = []

    def body() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - handed to the test
            results.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return results[0]


def test_no_context_stays_on_pycudas_stack(machine: Machine) -> None:
    """Else pycuda aborts the process at its end, and `vqbet-build` seems to have failed."""
    cuda = PyCuda()
    cuda.device_memory(16)
    cuda.host_memory(16)
    act(cuda)
    assert machine.contexts.stack == []


def test_a_failed_allocation_leaves_nothing_on_the_stack(machine: Machine) -> None:
    cuda = PyCuda()
    machine.failing = "mem_alloc", DriverError("out of memory")
    with pytest.raises(BackendError):
        cuda.device_memory(16)
    assert machine.contexts.stack == []


def test_every_thread_may_act(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives the number of a thread that has ended to the next one."""
    cuda = PyCuda()
    monkeypatch.setattr(threading, "get_ident", lambda: 1)

    def work() -> list[int]:
        act(cuda)
        return machine.contexts.stack

    assert [in_a_thread(work) for _ in range(3)] == [[], [], []]


@pytest.mark.parametrize(
    ("function", "call", "name"),
    [
        ("mem_alloc", lambda cuda: cuda.device_memory(1 << 40), "allocating 1099511627776 bytes"),
        ("memset_d8", lambda cuda: cuda.device_memory(8), "allocating 8 bytes"),
        ("pagelocked_zeros", lambda cuda: cuda.host_memory(8), "allocating 8 page-locked bytes"),
        ("memcpy_htod_async", act, "copying to the GPU"),
        ("memcpy_dtod_async", act, "copying within the GPU"),
        ("memcpy_dtoh_async", act, "copying from the GPU"),
        ("record", act, "waiting for the GPU"),
    ],
)
@pytest.mark.parametrize("kind", [DriverError, MemoryError])
def test_errors_name_the_operation(
    machine: Machine, function: str, call: Any, name: str, kind: type[Exception]
) -> None:
    """`auto` takes the next backend after a BackendError, and dies of anything else."""
    cuda = PyCuda()
    machine.failing = function, kind("the reason")
    with pytest.raises(BackendError, match=rf"{name}.* failed: the reason"):
        call(cuda)


@pytest.mark.parametrize("function", ["Stream", "Event"])
def test_errors_while_opening(machine: Machine, function: str) -> None:
    machine.failing = function, DriverError("the reason")
    with pytest.raises(BackendError, match="the reason"):
        PyCuda()
