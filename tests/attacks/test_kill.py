"""Killed at any moment, a writer leaves the old or the new, and the next one cleans up."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from attacks.saving import checkpoints, network, progress
from torture import counts
from vqbet_export.publishing import file_specs, publish

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.training.checkpoint import load_checkpoint

OPTIMIZER = {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


def killed(work: Callable[[], None], seconds: float) -> None:
    """Run `work` in a fork and end it with SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("count", counts(3, 10, 300))
def test_an_export(mini: Path, tmp_path: Path, count: int) -> None:
    original, target = Bundle.open(mini), tmp_path / "a.bundle"
    variants = {}
    for note in (b"old", b"new"):
        contents = {**original.contents, "report.md": note}
        manifest = msgspec.structs.replace(original.manifest, files=file_specs(contents))
        variants[note] = contents, manifest

    def work() -> None:
        while True:
            for variant in variants.values():
                publish(target, *variant)

    began = time.monotonic()
    publish(target, *variants[b"old"])
    taken = time.monotonic() - began
    random = np.random.default_rng(5)
    seen, replaced = set(), set()
    for _ in range(count):
        killed(work, random.uniform(0, 5 * taken))  # before, while and after it writes
        seen.add(Bundle.open(target).contents["report.md"])
        replaced.add((target / "report.md").stat().st_mtime_ns)
    assert seen <= {b"old", b"new"}
    assert len(replaced) > 1  # it did write
    publish(target, *variants[b"old"])
    assert os.listdir(tmp_path) == ["a.bundle"]
    assert sorted(os.listdir(target)) == sorted({*variants[b"old"][0], "manifest.json"})


@pytest.mark.parametrize("count", counts(3, 10, 300))
def test_a_checkpoint(tmp_path: Path, count: int) -> None:
    saved, made = checkpoints(tmp_path), network()
    saved.save(progress(1), made, None, OPTIMIZER)
    step = 1

    def work() -> None:
        for following in range(step + 1, step + 1000):
            saved.save(progress(following), made, None, OPTIMIZER)

    random = np.random.default_rng(6)
    for _ in range(count):
        killed(work, random.uniform(0, 0.2))
        resumed = checkpoints(tmp_path, resume=True).start()
        assert resumed is not None
        assert step <= resumed.progress.step
        assert resumed.optimizer == OPTIMIZER
        load_checkpoint(str(saved.last / "pretrained_model"))
        step = resumed.progress.step
        left = [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]
        assert left == []
    assert step > 1  # it did save
