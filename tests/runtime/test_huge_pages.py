"""Weights on huge pages, as Linux counts them."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqbet_edge.runtime.backends import huge_pages

# In a process of its own: nobody else's memory is counted. NumPy asks for huge pages by itself.
MOVING = """
import json, mmap, re
from vqbet_edge.runtime.backends.huge_pages import on_huge_pages

with on_huge_pages():  # what the first time loads is not the blocks' memory
    pass

def kilobytes(field):
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(field + r":\\s+(\\d+)", file.read())[1])

def small_pages():
    # Nothing but who is tested moves them, whatever the system's setting is.
    block = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_NOHUGEPAGE)
    block.write(bytes(range(256)) * (len(block) // 256))
    block.madvise(mmap.MADV_HUGEPAGE)
    return block

old = small_pages()
with on_huge_pages():
    new = small_pages()
    before = kilobytes("AnonHugePages"), kilobytes("Anonymous")
after = kilobytes("AnonHugePages"), kilobytes("Anonymous")
same = all(block[:] == bytes(range(256)) * (len(block) // 256) for block in (old, new))
print(json.dumps({"huge": after[0] - before[0], "more": after[1] - before[1], "same": same}))
"""


def can_collapse() -> bool:
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    return sys.platform == "linux" and release >= (6, 1) and huge_pages._SIZE.exists()


@pytest.mark.skipif(not can_collapse(), reason="this kernel has no MADV_COLLAPSE")
def test_what_is_new_moves_and_takes_no_more_memory() -> None:
    done = subprocess.run([sys.executable, "-c", MOVING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 24 << 10 <= found["huge"] <= 34 << 10  # of 32 MiB new and as many old ones
    assert found["more"] < 1 << 10
    assert found["same"]


@pytest.mark.parametrize("missing", ["_SIZE", "_heaps"])
def test_where_the_kernel_hides_its_memory_nothing_happens(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden() -> None:
        raise PermissionError("/proc/self/maps")

    absent = hidden if missing == "_heaps" else Path("/nowhere/hpage_pmd_size")
    monkeypatch.setattr(huge_pages, missing, absent)
    with huge_pages.on_huge_pages():
        kept = np.arange(1000)
    assert kept.sum() == 499_500
