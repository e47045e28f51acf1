"""Disks that are full, read-only or somebody else's: exit code 5, and what was there stays.

A small tmpfs stands for the disk; only root may mount one, and without it the tests are skipped.
Root may write everywhere, so the forbidden folder is written to by the user `nobody`.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from attacks.saving import checkpoints, network, progress
from vqbet_export.publishing import file_specs, publish

from vqbet_edge import DiskError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.training.checkpoint import load_checkpoint

NOBODY = 65534
OPTIMIZER: dict[str, object] = {"state": {}, "param_groups": []}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def fill(disk: Path) -> None:
    """Leave a few kilobytes."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize - 20_000))


def forbid(disk: Path) -> None:
    """Make it read-only."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


PROBLEMS = {"full": (fill, "No space left"), "read-only": (forbid, "Read-only file system")}


def export(mini: Path, target: Path, note: bytes) -> None:
    bundle = Bundle.open(mini)
    contents = {**bundle.contents, "report.md": note}
    publish(target, contents, msgspec.structs.replace(bundle.manifest, files=file_specs(contents)))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_export(mini: Path, disk: Path, problem: str) -> None:
    make, message = PROBLEMS[problem]
    export(mini, disk / "a.bundle", b"old")
    make(disk)
    for target in (disk / "a.bundle", disk / "b.bundle"):
        with pytest.raises(DiskError, match=rf"\(\d+ bytes\): {message}") as refused:
            export(mini, target, b"new")
        assert refused.value.exit_code == 5
    assert Bundle.open(disk / "a.bundle").contents["report.md"] == b"old"
    assert set(os.listdir(disk)) <= {"a.bundle", "filler"}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_checkpoint(disk: Path, problem: str) -> None:
    make, message = PROBLEMS[problem]
    saved = checkpoints(disk)
    saved.save(progress(1), network(), None, OPTIMIZER)
    make(disk)
    with pytest.raises(DiskError, match=message) as refused:
        saved.save(progress(2), network(), None, OPTIMIZER)
    assert refused.value.exit_code == 5
    if problem == "full":
        size = (saved.last / "pretrained_model" / "model.safetensors").stat().st_size
        assert re.search(rf"model.safetensors \({size} bytes\)", str(refused.value))
    load_checkpoint(str(saved.last / "pretrained_model"))
    assert sorted(os.listdir(disk / "checkpoints")) == ["000001", "last"]


def as_nobody(work: Callable[[], None]) -> str:
    """The DiskError of what a user without rights does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            work()
        except DiskError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as file:  # noqa: PTH123 - opened by descriptor
        return file.read().decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_somebody_elses_folder(mini: Path, disk: Path) -> None:
    for path in disk.parents:
        if path.stat().st_uid == 0 and path.is_relative_to("/tmp") and path != Path("/tmp"):  # noqa: S108
            path.chmod(0o755)
    export(mini, disk / "a.bundle", b"old")
    checkpoints(disk).save(progress(1), network(), None, OPTIMIZER)
    bundle = Bundle.open(mini)
    disk.chmod(0o755)
    denied = as_nobody(lambda: publish(disk / "a.bundle", bundle.contents, bundle.manifest))
    assert re.search(r"\(\d+ bytes\): Permission denied", denied)
    denied = as_nobody(lambda: checkpoints(disk).save(progress(2), network(), None, OPTIMIZER))
    assert "Permission denied" in denied
    assert Bundle.open(disk / "a.bundle").contents["report.md"] == b"old"
    load_checkpoint(str(checkpoints(disk).last / "pretrained_model"))
