"""Weights on huge pages: after a pause, the processor no longer knows where small pages are.

Every 4 KiB of weights is an entry of the page table that has left the caches by the next
prediction. Linux moves memory to pages of 2 MiB when it is asked to (6.1 or newer, whatever
/sys/kernel/mm/transparent_hugepage/enabled says); elsewhere nothing happens.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MADV_COLLAPSE = 25  # of Linux's asm-generic/mman-common.h
# Of an entry of /proc/self/pagemap (Linux's admin-guide/mm/pagemap): the page is in memory.
_PRESENT = np.uint64(1 << 63)


@contextlib.contextmanager
def on_huge_pages() -> Iterator[None]:
    """Move to huge pages what is allocated in here and still there at the end."""
    try:
        size, before = int(_SIZE.read_text()), _heaps()
    except OSError:  # no Linux, or a container that hides it
        yield
        return
    yield
    libc = ctypes.CDLL(None)
    for block in _new_blocks(before, _heaps(), size):
        # What cannot be moved stays where it is.
        libc.madvise(ctypes.c_void_p(block), ctypes.c_size_t(size), _MADV_COLLAPSE)


def _heaps() -> list[range]:
    """Addresses of this process's own memory that no file is behind."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, access, _, _, inode, *name = line.split()
        if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, stop = (int(address, 16) for address in extent.split("-"))
            found.append(range(start, stop))
    return found


def _new_blocks(before: list[range], after: list[range], size: int) -> Iterator[int]:
    """Where huge pages fit into what is new and in use from end to end: no memory is added."""
    with contextlib.suppress(OSError), Path("/proc/self/pagemap").open("rb") as pagemap:
        for heap in after:
            for start in range(-(-heap.start // size) * size, heap.stop - size + 1, size):
                if any(old.start < start + size and start < old.stop for old in before):
                    continue
                pagemap.seek(start // mmap.PAGESIZE * 8)
                entries = np.frombuffer(pagemap.read(size // mmap.PAGESIZE * 8), np.uint64)
                if (entries & _PRESENT).all():
                    yield start
