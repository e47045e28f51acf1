"""TensorRT's timing cache is read only when nobody else can have written it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from vqbet_engines import engines
from vqbet_engines.engines import read_timing, write_timing

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends.cuda import Device
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT

HERE = (
    TensorRT(SimpleNamespace(), "tensorrt", "10.3.0"),
    Device("Orin", "8.7", "12.6", integrated=True),
)


def test_only_what_nobody_else_can_have_written_is_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_timing(*HERE) == b""
    write_timing(*HERE, b"measured")
    assert read_timing(*HERE) == b"measured"
    (file,) = (cache / "timing").iterdir()
    for mode in (0o620, 0o602):
        file.chmod(mode)
        assert read_timing(*HERE) == b""
    write_timing(*HERE, b"measured")
    with monkeypatch.context() as patch:
        patch.setattr(engines, "_MAX_TIMING_BYTES", 7)
        assert read_timing(*HERE) == b""
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert read_timing(*HERE) == b""
    cache.chmod(0o777)
    with pytest.raises(DiskError, match="somebody else"):
        read_timing(*HERE)
