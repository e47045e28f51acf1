"""A bundle appears whole or not at all; what a kill leaves, `attacks/test_kill` knows."""

import os
from pathlib import Path

import msgspec
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
    """Behind a link too, which stands for it."""
    real, link = tmp_path / "releases" / "v1", tmp_path / "current"
    link.symlink_to(real)
    for target, text in ((real, b"one"), (real, b"two"), (link, b"three"), (link, b"four")):
        publish(target, *variant(source, text))
        assert note(real) == text
        assert link.is_symlink()
    assert os.listdir(real.parent) == ["v1"]
    assert sorted(os.listdir(tmp_path)) == ["current", "releases"]


def test_a_planted_link_is_not_emptied(tmp_path: Path, source: tuple) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("data")
    (tmp_path / ".a.bundle.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(DiskError):
        publish(tmp_path / "a.bundle", *source)
    assert (tmp_path / "precious" / "file").read_text() == "data"


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
    with pytest.raises(DiskError, match="choose another place with -o"):
        publish(target / "manifest.json" / "a.bundle", *source)
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match=r"\(\d+ bytes\): No space left on device") as caught:
            publish(target, *variant(source, b"new"))
    assert caught.value.exit_code == 5
    assert note(target) == b"old"
    assert os.listdir(tmp_path) == ["a.bundle"]
