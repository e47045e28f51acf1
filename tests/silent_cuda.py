"""A GPU that computes nothing."""

from typing import Any

import numpy as np

from vqbet_edge.runtime.backends.cuda import Cuda, Device, HostMemory, Launch


class SilentCuda(Cuda):
    """Hands out addresses and counts them."""

    stream = 7
    device = Device("Orin", "8.7", "12.6", integrated=True)

    def __init__(self) -> None:
        self.next = 1 << 20
        self.allocations = 0

    def make_current(self) -> None: ...

    def device_memory(self, size: int) -> int:
        self.allocations += 1
        self.next += size
        return self.next - size

    def host_memory(self, size: int) -> HostMemory:
        return HostMemory(np.zeros(size, np.uint8), self.device_memory(size))

    def to_device(self, address: int, source: Any) -> None: ...
    def to_host(self, target: Any, address: int) -> None: ...
    def copy(self, target: int, source: int, size: int) -> None: ...
    def synchronize(self) -> None: ...

    def capture(self, enqueue: Launch) -> Launch:
        enqueue()
        return lambda: None
