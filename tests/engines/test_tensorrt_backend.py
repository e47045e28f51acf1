"""The TensorRT backend over a stand-in for the module: what it checks and in which order."""

import gc
import logging
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver
from fake_tensorrt import FakeTensorRT

from vqbet_edge.errors import BackendError, UsageError
from vqbet_edge.runtime import backends
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends import tensorrt as backend_module
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
from vqbet_edge.runtime.backends.private_files import user_cache
from vqbet_edge.runtime.backends.tensorrt import BUILD_VARIABLE, TensorRTBackend, engine_key
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT, import_tensorrt, process_log
from vqbet_edge.runtime.bundle import Bundle


@pytest.fixture
def trt(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    del cache
    monkeypatch.delenv(BUILD_VARIABLE, raising=False)
    return TensorRT(FakeTensorRT(bundle, FakeDriver()), "tensorrt", "10.3.0")


def store(bundle: Bundle, trt: TensorRT) -> None:
    for stage in bundle.stages_to_load:
        key = engine_key(bundle, stage, trt, Cuda(FakeDriver()).device, BuildOptions(512))
        EngineCache().store(key, stage.encode(), 1.0)


def load(bundle: Bundle, trt: TensorRT, **options: Any) -> TensorRTBackend:
    return TensorRTBackend(bundle, cuda=Cuda(trt.module.driver), tensorrt=trt, **options)


def test_addresses_are_set_once_and_shared_and_warm_up_precedes_capture(
    untabulated: Bundle, trt: TensorRT
) -> None:
    store(untabulated, trt)
    window = load(untabulated, trt).create_window()
    log = trt.module.driver.log
    before = log[: log.index("cuStreamBeginCapture")]
    assert before.count("trt execute_async_v3") >= 3 * len(untabulated.stages_to_load)
    addresses = [
        pair for each in trt.module.living for pair in getattr(each, "addresses", {}).items()
    ]
    by_tensor = dict(addresses)
    # `feature` leaves the GPT and enters the heads: one address under both stages.
    assert len(addresses) == len(by_tensor) + 1
    assert all(by_tensor[name] == address for name, address in addresses)
    calls = trt.module.driver.calls["trt set_tensor_address"]
    window.predict(np.zeros((3, 2), np.float32))
    assert trt.module.driver.calls["trt set_tensor_address"] == calls


def test_siblings_share_engines(bundle: Bundle, trt: TensorRT) -> None:
    store(bundle, trt)
    backend = load(bundle, trt)
    windows = [backend.create_window() for _ in range(3)]
    stages = len(bundle.stages_to_load)
    assert trt.module.driver.calls["trt deserialize_cuda_engine"] == stages
    assert trt.module.driver.calls["trt create_execution_context"] == stages * len(windows)
    for window in windows:
        window.close()
    assert not trt.module.living
    assert not any(trt.module.driver.books.values())


def test_missing_engines_are_built_by_the_command(
    bundle: Bundle, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no context open here meanwhile: small boards need the memory."""
    commands, codes = [], [5, 0]

    def build(command: list[str], **_options: Any) -> Any:
        assert trt.module.driver.retained == 0
        commands.append(command)
        if len(codes) == 1:
            store(bundle, trt)
        return SimpleNamespace(returncode=codes.pop(0))

    monkeypatch.setattr("vqbet_edge.runtime.backends.tensorrt.subprocess.run", build)
    with pytest.raises(BackendError, match=r"exit code 5.*vqbet-build"):
        load(bundle, trt)
    load(bundle.without_graphs(), trt).close()  # engines are all that TensorRT needs
    wanted = ["vqbet_engines.build_command", str(bundle.path), "--flavour", "tensorrt"]
    assert commands == [module_command(*wanted)] * 2


def test_one_logger_that_knows_no_backend(
    bundle: Bundle, trt: TensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT keeps the first logger for ever and ignores the others."""
    store(bundle, trt)
    first = load(bundle, trt)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    backend = load(bundle, trt)
    assert len(set(map(id, trt.module.loggers))) == 1
    # What is logged now is the second policy's, and reaches it.
    window = backend.create_window()
    trt.module.driver.faults[len(trt.module.driver.log) + 2] = 1  # type: ignore[assignment]
    window._graphs.clear()
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(BackendError, match=r"failed in gpt: execute_async_v3 was told to fail"),
    ):
        window._run("gpt", window._execution.stages["gpt"])
    assert "execute_async_v3 was told to fail" in caplog.messages
    log = process_log(trt)
    for number in range(1000):
        log.logger.log(SimpleNamespace(name="ERROR"), f"error {number}")
    assert log.last_error() == "error 999"
    assert sum(1 for _ in iter(log.last_error, None)) < 100


def test_without_a_good_engine_nothing_is_deserialised(
    bundle: Bundle, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUILD_VARIABLE, "0")
    with pytest.raises(BackendError, match=r"no engine has been built.*vqbet-build") as caught:
        load(bundle, trt)
    assert caught.value.exit_code == 6
    store(bundle, trt)
    for plan in user_cache().glob("engines/*/gpt-*.plan"):
        plan.write_bytes(b"gp!")
    with pytest.raises(BackendError, match="altered"):
        load(bundle, trt)
    assert not any(call.startswith("trt") for call in trt.module.driver.log)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ("Runtime", "TypeError: pybind11::init.*nullptr"),
        ("deserialize_cuda_engine", "refuses the engine of vision_encoder: deser.*told to fail"),
        ("create_execution_context", "has no memory for vision_encoder"),
        ("set_tensor_address", "refuses the memory of frames in vision_encoder"),
        ("execute_async_v3", "failed in vision_encoder: execute_async_v3 was told to fail"),
    ],
)
def test_what_tensorrt_refuses_while_loading(
    bundle: Bundle, trt: TensorRT, call: str, match: str
) -> None:
    store(bundle, trt)
    load(bundle, trt).close()
    number = trt.module.driver.log.index(f"trt {call}") + 1
    trt.module.driver.log.clear()
    trt.module.driver.faults[number] = 1  # type: ignore[assignment]
    with pytest.raises(BackendError, match=match):
        load(bundle, trt)
    gc.collect()
    assert not trt.module.living
    assert not any(trt.module.driver.books.values())


@pytest.mark.parametrize("version", ["8.6.2.3", "9.3.0"])
def test_a_tensorrt_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(f"__version__ = '{version}'\nclass Builder: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendError, match=rf"{version} is too old.*opset 20.*JetPack 6\.1"):
        import_tensorrt("tensorrt")
    sys.modules.pop("tensorrt", None)


def test_auto_says_what_it_took_in_one_short_line(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """And at level INFO why nothing faster."""
    backends._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        chosen = create_backend("auto", bundle)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [f"backend: {chosen.name}"]
    better = {"onnxruntime": ["tensorrt", "onnxruntime-cuda"], "onnxruntime-cuda": ["tensorrt"]}
    for name in better.get(chosen.name, []):
        assert any(message.startswith(f"not {name}: ") for message in caplog.messages)


@pytest.mark.parametrize("error", [TypeError("nullptr"), MemoryError()])
def test_auto_goes_on_after_a_librarys_own_error(
    bundle: Bundle,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def broken(*_arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(backend_module, "import_tensorrt", broken)
    with caplog.at_level(logging.INFO):
        assert create_backend("auto", bundle).name != "tensorrt"
    assert any(
        message.startswith("not tensorrt: ") and type(error).__name__ in message
        for message in caplog.messages
    )
    with pytest.raises(BackendError, match=f"tensorrt.*{type(error).__name__}"):
        create_backend("tensorrt", bundle)
    with pytest.raises(UsageError, match="tensorrt"):
        create_backend("nonsense", bundle)  # type: ignore[arg-type]


def test_auto_goes_on_when_the_warm_up_fails(
    bundle: Bundle, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is part of loading, and not of the first action."""
    store(bundle, trt)
    monkeypatch.setattr(backend_module, "import_tensorrt", lambda: trt)
    monkeypatch.setattr(backend_module, "create_cuda", lambda: Cuda(trt.module.driver))
    assert create_backend("auto", bundle).name == "tensorrt"
    trt.module.driver.log.clear()
    monkeypatch.setattr("fake_tensorrt.Context.execute_async_v3", lambda *_arguments: False)
    assert create_backend("auto", bundle).name != "tensorrt"


def test_what_auto_must_be_one_of_is_not_replaced(
    bundle: Bundle, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update of the driver makes the engines useless, and the CPU is no surprise."""
    store(bundle, trt)
    monkeypatch.setattr(backend_module, "import_tensorrt", lambda: trt)
    monkeypatch.setattr(backend_module, "create_cuda", lambda: Cuda(trt.module.driver))
    assert create_backend("auto", bundle, require=["tensorrt"]).name == "tensorrt"
    assert create_backend("auto", bundle, require=["onnxruntime"]).name == "onnxruntime"
    monkeypatch.setattr(FakeDriver, "cuDriverGetVersion", lambda _: (0, 13000))
    said = r"it was built for driver 12\.6, needed is 13\.0; build the engines with: vqbet-build"
    with pytest.raises(BackendError, match=said):
        create_backend("auto", bundle, require=["tensorrt"])
    assert create_backend("auto", bundle, require=["tensorrt", "onnxruntime"]).name == "onnxruntime"


def test_a_gpu_that_nobody_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.names = []
    with pytest.raises(BackendError, match="CUDA_ERROR_NO_DEVICE; see vqbet-doctor"):
        Cuda(driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(BackendError, match="NO_DEVICE with CUDA_VISIBLE_DEVICES='3', which shows"):
        Cuda(driver)
