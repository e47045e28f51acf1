"""A policy that acts for hours: no memory, no descriptor, no thread more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torture import FULL, cases

# In a process of its own, so that nothing but acting takes memory.
ACTING = """
import gc, json, os, sys, threading
import numpy as np
from vqbet_edge import EdgePolicy

calls = int(sys.argv[2])
random = np.random.default_rng(15)
seen = [
    {"observation.image": random.integers(0, 256, (24, 24, 3), np.uint8),
     "observation.state": random.uniform((-2, 10), (2, 50)).astype(np.float32)}
    for _ in range(97)
]

def kilobytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

def look():
    return {"kilobytes": kilobytes(), "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")), "python_threads": threading.active_count(),
            "blocks": sys.getallocatedblocks()}

policy = EdgePolicy.load(sys.argv[1], backend="onnxruntime", temperature=1.0)
for call in range(calls):
    if call % 1009 == 0:
        policy.reset()
    policy.act(seen[call % len(seen)])
    if call % (calls // 50) == calls // 50 - 1:
        gc.collect()
        print(json.dumps(look()))  # kept here, they would grow
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_policy_that_acts_on_and_on(mini: Path) -> None:
    calls = cases(3_000, 1_000_000)
    done = subprocess.run(
        [sys.executable, "-c", ACTING, mini, str(calls)], capture_output=True, text=True, check=True
    )
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    flat = looks[len(looks) // 5 :]
    for name in ("descriptors", "threads", "python_threads"):
        assert {look[name] for look in flat} == {looks[0][name]}
    # Python's own objects, but for what its caches take: one left by every sixth call would be seen.
    blocks = [look["blocks"] for look in flat]
    assert max(blocks) - min(blocks) <= calls // 8
    sizes = [look["kilobytes"] for look in flat]
    assert max(sizes) - min(sizes) <= 1024
    if FULL:  # flat, not slowly rising: the last quarter is where the first was
        quarter = len(sizes) // 4
        assert sum(sizes[-quarter:]) / quarter - sum(sizes[:quarter]) / quarter <= 256
