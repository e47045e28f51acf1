"""TensorRT's timing cache is read only when nobody else can have written it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from vqbet_engines import engines
from vqbet_engines.engines import _TimingCache

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends.cuda import Device
from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT

DEVICE = Device("Orin", "8.7", "12.6", integrated=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(path))
    return path


@pytest.fixture
def timing() -> _TimingCache:
    return _TimingCache(TensorRT(SimpleNamespace(), "tensorrt", "10.3.0"), DEVICE)


def test_what_was_written_is_read(timing: _TimingCache) -> None:
    assert timing.read() == b""
    timing.write(b"measured")
    assert timing.read() == b"measured"


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write(timing: _TimingCache, home: Path, mode: int) -> None:
    timing.write(b"measured")
    (file,) = (home / "timing").iterdir()
    file.chmod(mode)
    assert timing.read() == b""


def test_a_link_is_not_followed(timing: _TimingCache, home: Path, tmp_path: Path) -> None:
    timing.write(b"measured")
    (file,) = (home / "timing").iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert timing.read() == b""


def test_a_file_that_is_too_large(timing: _TimingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    timing.write(b"measured")
    monkeypatch.setattr(engines, "_MAX_TIMING_BYTES", 7, raising=False)
    assert timing.read() == b""


def test_a_cache_that_others_may_write(timing: _TimingCache, home: Path) -> None:
    timing.write(b"measured")
    home.chmod(0o777)
    with pytest.raises(DiskError, match="somebody else"):
        timing.read()
