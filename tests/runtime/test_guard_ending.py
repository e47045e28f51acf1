"""Nobody waits for ever: not for a backend or a disk that hangs, and not at Python's end."""

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from safetensors.numpy import load_file
from torture import cases

from vqbet_edge import DeadlineError, DiskError, EdgePolicy, Guards, UsageError
from vqbet_edge.runtime import acting, recording

LATE = Guards(deadline_s=0.05, on_late="hold")


@contextmanager
def hanging(policy: EdgePolicy, stage: str) -> Iterator[None]:
    """A stage that does not return before the block's end."""
    graphs, go, hung = policy._window.graphs, threading.Event(), threading.Event()
    run = getattr(graphs, stage)

    def hangs(*arguments: Any, **options: Any) -> Any:
        hung.set()
        if go.wait(60):
            return run(*arguments, **options)
        go.set()  # somebody waited for it
        raise AssertionError("nobody came to the block's end")

    setattr(graphs, stage, hangs)
    try:
        yield
        assert hung.wait(60)
        assert not go.is_set()
    finally:
        setattr(graphs, stage, run)
        go.set()


@pytest.mark.parametrize("guards", [None, LATE])
@pytest.mark.parametrize("call", ["reset", "close"])
def test_a_prefetch_that_hangs_does_not_hold_reset_and_close(
    mini: Path, monkeypatch: pytest.MonkeyPatch, guards: Guards | None, call: str
) -> None:
    monkeypatch.setattr(acting, "_PATIENCE_S", 0.1)
    policy = EdgePolicy.load(mini, "onnxruntime", guards=guards, prefetch="thread", replan_every=2)
    plain = EdgePolicy.load(mini, "onnxruntime", prefetch="thread", replan_every=2)
    observations, deadline = miniature.observations(6), policy._deadline

    def in_step(place: int) -> None:
        if deadline is not None:
            deadline._seconds = 30
        got, expected = (each.act(observations[place]) for each in (policy, plain))
        np.testing.assert_array_equal(got, expected)

    in_step(0)
    with hanging(policy, "prefill"):
        in_step(1)  # the queue's last: what comes next is prepared
        if deadline is not None:  # the policy itself is not held
            deadline._seconds = 0.05
            policy.act(observations[2])
            plain.act(observations[2])
        with pytest.raises(DeadlineError, match="still works on an earlier call"):
            getattr(policy, call)()
        sibling = policy.sibling(seed=4)  # neither are others
        sibling.act_chunk(observations[0])
    if deadline is not None:
        deadline.finish(lambda: None)
    # Nothing was forgotten.
    for place in range(3 if guards else 2, 6):
        in_step(place)
    sibling.close()
    monkeypatch.setattr(acting, "_PATIENCE_S", 60)
    getattr(policy, call)()


def test_a_policy_that_is_dropped_does_not_wait_for_its_prefetch(mini: Path) -> None:
    policy = EdgePolicy.load(mini, "onnxruntime", prefetch="thread", replan_every=1)
    with hanging(policy, "prefill"):
        policy.act(miniature.observations(1)[0])
        del policy
        gc.collect()


def test_a_disk_that_hangs_is_told_at_the_blocks_end(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_PATIENCE_S", 0.1)
    disk, write = threading.Event(), recording._write_file

    def hangs(*arguments: Any) -> None:
        disk.wait(60)
        write(*arguments)

    monkeypatch.setattr(recording, "_write_file", hangs)
    policy = EdgePolicy.load(mini, "onnxruntime")
    with pytest.raises(DiskError, match=r"the disk hangs.*was not written"):  # noqa: SIM117
        with policy.record(tmp_path / "seen"):
            policy.act(miniature.observations(1)[0])
    disk.set()
    policy.act(miniature.observations(1)[0])


def test_a_policy_records_to_one_folder_at_a_time(mini: Path, tmp_path: Path) -> None:
    policy = EdgePolicy.load(mini, "onnxruntime")
    with policy.record(tmp_path / "first"):
        policy.act(miniature.observations(1)[0])
        with (
            pytest.raises(UsageError, match=r"records to '.*first' already; leave that block"),
            policy.record(tmp_path / "second"),
        ):
            pass
        policy.act(miniature.observations(1)[0])
    assert not (tmp_path / "second").exists()
    (file,) = (tmp_path / "first").iterdir()
    assert len(load_file(file)["step"]) == 2


PROGRAM = """
import sys, threading, time
import numpy as np
from vqbet_edge import EdgePolicy, Guards
bundle, prefetch, how = sys.argv[1:]
guards = Guards(deadline_s=60, on_late="raise") if how == "deadline" else None
policy = EdgePolicy.load(bundle, "onnxruntime", prefetch=prefetch, guards=guards)
observation = {"observation.image": np.zeros((24, 24, 3), np.uint8),
               "observation.state": np.float32([0, 20])}
acted = threading.Event()

def loop():
    while True:
        policy.act(observation)
        if how != "hangs":
            acted.set()
        if how == "load":
            EdgePolicy.load(bundle, "onnxruntime").close()

if how == "hangs":
    encode = policy._window.graphs.encode
    policy.act(observation)
    policy._window.graphs.encode = lambda *_: (acted.set(), threading.Event().wait())
threading.Thread(target=loop, daemon=True).start()
assert acted.wait(60)
time.sleep(0.05)
print("last line", flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("prefetch", "how"),
    [
        ("thread", "acts"),
        ("off", "acts"),
        ("off", "deadline"),
        ("off", "load"),
        ("thread", "hangs"),
    ],
)
def test_python_ends_while_a_daemon_thread_acts(mini: Path, prefetch: str, how: str) -> None:
    """An abort is 134 to a shell, -6 here; the timeout is for what hangs."""
    command = [sys.executable, "-c", PROGRAM, str(mini), prefetch, how]
    for _ in range(cases(1, 20)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout) == (7, "last line\n"), done.stderr
        assert "Traceback" not in done.stderr


def test_the_end_waits_for_jobs_and_holds_who_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from vqbet_edge.runtime import ending

    monkeypatch.setattr(ending, "RUNNING", set())
    monkeypatch.setattr(ending, "_ending", None)
    entered, order = threading.Event(), []

    def late() -> None:
        entered.set()
        with ending.computing():
            order.append("late")

    def work(done: Callable[[], None]) -> None:
        with ending.computing():
            entered.set()
            threading.Event().wait(0.2)
            order.append("work")
        done()

    threading.Thread(target=work, args=(lambda: None,), daemon=True).start()
    entered.wait(10)
    ending._wait()
    assert order == ["work"]
    entered.clear()
    held = threading.Thread(target=late, daemon=True)
    held.start()
    entered.wait(10)
    with ending.computing():  # the thread that ends Python may still call
        order.append("own")
    held.join(0.2)
    assert held.is_alive()
    assert order == ["work", "own"]
