"""A bundle appears whole or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from vqbet_export import publishing
from vqbet_export.publishing import file_specs, publish
from workshop import Exported

from vqbet_edge import DiskError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Manifest

Contents = dict[str, bytes]


@pytest.fixture
def source(tiny: Exported) -> tuple[Contents, Manifest]:
    bundle = Bundle.open(tiny.bundle)
    return dict(bundle.contents), bundle.manifest


def variant(source: tuple[Contents, Manifest], note: bytes) -> tuple[Contents, Manifest]:
    contents = {**source[0], "report.md": note}
    return contents, msgspec.structs.replace(source[1], files=file_specs(contents))


def note(path: Path) -> bytes:
    return Bundle.open(path).contents["report.md"]


def test_replaces_the_old_bundle_and_leaves_nothing_else(tmp_path: Path, source: tuple) -> None:
    target = tmp_path / "a.bundle"
    for text in (b"one", b"two", b"three"):
        publish(target, *variant(source, text))
        assert note(target) == text
        assert os.listdir(tmp_path) == ["a.bundle"]


def test_a_link_to_a_bundle_stands_for_it(tmp_path: Path, source: tuple) -> None:
    real, link = tmp_path / "releases" / "v1", tmp_path / "current"
    publish(real, *variant(source, b"one"))
    link.symlink_to(real)
    for text in (b"two", b"three"):
        publish(link, *variant(source, text))
        assert link.is_symlink()
        assert note(real) == text
    assert sorted(os.listdir(tmp_path)) == ["current", "releases"]


def test_a_planted_link_is_not_emptied(tmp_path: Path, source: tuple) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("data")
    (tmp_path / ".a.bundle.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(DiskError):
        publish(tmp_path / "a.bundle", *source)
    assert (tmp_path / "precious" / "file").read_text() == "data"


KILLED = """
import sys, pathlib
sys.path[:0] = {path!r}
from vqbet_edge.runtime.bundle import Bundle
from vqbet_export.publishing import publish
bundle = Bundle.open({bundle!r})
print("ready", flush=True)
while True:
    publish(pathlib.Path({target!r}), bundle.contents, bundle.manifest)
"""


def test_killed_at_any_moment_old_or_new_is_there(tmp_path: Path, source: tuple) -> None:
    target, other = tmp_path / "a.bundle", tmp_path / "other" / "b.bundle"
    publish(target, *variant(source, b"old"))
    publish(other, *variant(source, b"new"))
    code = KILLED.format(path=sys.path, bundle=str(other), target=str(target))
    random = np.random.default_rng(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert note(target) in {b"old", b"new"}
    assert note(target) == b"new"
    publish(target, *variant(source, b"next"))
    assert note(target) == b"next"
    assert sorted(os.listdir(tmp_path)) == ["a.bundle", "other"]


def test_a_second_writer_is_told_to_wait(tmp_path: Path, source: tuple) -> None:
    target = tmp_path / "a.bundle"
    with (
        publishing._private_directory(tmp_path / ".a.bundle.partial"),
        pytest.raises(UsageError, match="another export is writing"),
    ):
        publish(target, *source)


def test_full_disk_keeps_the_old_bundle(
    tmp_path: Path, source: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.bundle"
    publish(target, *variant(source, b"old"))
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match=r"\(\d+ bytes\): No space left on device") as caught:
            publish(target, *variant(source, b"new"))
    assert caught.value.exit_code == 5
    assert note(target) == b"old"
    assert os.listdir(tmp_path) == ["a.bundle"]


def test_directory_that_is_no_directory(tmp_path: Path, source: tuple) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="choose another place with -o"):
        publish(tmp_path / "file" / "a.bundle", *source)
