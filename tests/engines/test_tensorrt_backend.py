"""The TensorRT backend over a stand-in for the module: what it checks and in which order."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from silent_cuda import SilentCuda
from sizes import SMALL

from vqbet_edge.errors import BackendError, UsageError
from vqbet_edge.runtime import backends
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE
from vqbet_edge.runtime.backends.tensorrt import BUILD_VARIABLE, TensorRTBackend, engine_key
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT, import_tensorrt
from vqbet_edge.runtime.bundle import Bundle


class Module(SimpleNamespace):
    """As much of TensorRT's runtime as the backend uses; plans are the names of their stages."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(calls=[], runs=0, bundle=bundle, accept=True, shapes={})
        self.ILogger = type("ILogger", (), {"__init__": lambda _self: None})
        self.Runtime = lambda _logger: self.runtime
        self.runtime = SimpleNamespace(
            deserialize_cuda_engine=self.deserialize, engine_host_code_allowed=True
        )
        self.nptype = np.dtype

    def deserialize(self, plan: bytes) -> Any:
        assert self.runtime.engine_host_code_allowed is False
        self.calls.append(f"deserialize {plan.decode()}")
        spec = self.bundle.manifest.stages[plan.decode()]
        tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        return SimpleNamespace(
            num_io_tensors=len(tensors),
            get_tensor_name=list(tensors).__getitem__,
            get_tensor_dtype=lambda name: SimpleNamespaceDtype(tensors[name].dtype),
            get_tensor_shape=lambda name: self.shapes.get(name, tensors[name].shape),
            create_execution_context=lambda: self.context(plan.decode()),
        )

    def context(self, stage: str) -> Any:
        return SimpleNamespace(
            set_tensor_address=lambda name, address: self.calls.append((stage, name, address)),
            execute_async_v3=lambda stream: self.run(stage, stream),
        )

    def run(self, stage: str, stream: int) -> bool:
        assert stream == SilentCuda.stream
        self.calls.append(f"run {stage}")
        return self.accept


class SimpleNamespaceDtype:
    """What TensorRT's `nptype` returns has a name, as NumPy's scalar types do."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def bundle(make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(BUILD_VARIABLE, raising=False)
    bundle = make_bundle("fp16", **SMALL)
    shutil.rmtree(bundle.path / "engines", ignore_errors=True)
    return bundle


@pytest.fixture
def trt(bundle: Bundle) -> TensorRT:
    module = Module(bundle)
    module.nptype = lambda dtype: SimpleNamespace(__name__=dtype.name)
    return TensorRT(module, "tensorrt", "10.3.0")


def store(bundle: Bundle, trt: TensorRT) -> None:
    for stage in bundle.stages_to_load:
        key = engine_key(bundle, stage, trt, SilentCuda.device, BuildOptions(512))
        EngineCache(bundle.path).store(key, stage.encode(), 1.0)


def test_addresses_are_set_once_and_shared(bundle: Bundle, trt: TensorRT) -> None:
    store(bundle, trt)
    backend = TensorRTBackend(bundle, cuda=SilentCuda(), tensorrt=trt)
    addresses = [call for call in trt.module.calls if isinstance(call, tuple)]
    by_tensor = {name: address for _, name, address in addresses}
    # `feature` leaves the GPT and enters the heads: one address under both stages.
    assert len(addresses) == len(by_tensor) + 1
    assert all(by_tensor[name] == address for _, name, address in addresses)
    states = next(t for t in bundle.manifest.stages["gpt"].inputs if t.name == "states")
    backend.predict(np.zeros(states.shape, np.float32))
    assert [call for call in trt.module.calls if isinstance(call, tuple)] == addresses


def test_warm_up_precedes_capture(bundle: Bundle, trt: TensorRT) -> None:
    store(bundle, trt)
    cuda = SilentCuda()
    runs_before_capture = []
    cuda.capture = lambda _enqueue: runs_before_capture.append(  # type: ignore[method-assign]
        trt.module.calls.count("run gpt")
    )
    TensorRTBackend(bundle, cuda=cuda, tensorrt=trt)
    assert len(runs_before_capture) == 3
    assert min(runs_before_capture) >= 4


def test_no_engine_and_building_off(
    bundle: Bundle, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUILD_VARIABLE, "0")
    with pytest.raises(BackendError, match=r"no engine has been built.*vqbet-build") as caught:
        TensorRTBackend(bundle, cuda=SilentCuda(), tensorrt=trt)
    assert caught.value.exit_code == 6
    assert trt.module.calls == []


def test_an_altered_engine_is_never_deserialised(bundle: Bundle, trt: TensorRT) -> None:
    store(bundle, trt)
    for plan in bundle.path.glob("engines/*/gpt-*.plan"):
        plan.write_bytes(b"gp!")
    with pytest.raises(BackendError, match="altered"):
        TensorRTBackend(bundle, cuda=SilentCuda(), tensorrt=trt, build=False)
    assert trt.module.calls == []


def test_an_engine_with_other_borders(bundle: Bundle, trt: TensorRT) -> None:
    store(bundle, trt)
    trt.module.shapes["feature"] = (2, 32)
    with pytest.raises(BackendError, match=r"engine of gpt has tensors.*\(2, 32\)"):
        TensorRTBackend(bundle, cuda=SilentCuda(), tensorrt=trt)


def test_a_failing_run(bundle: Bundle, trt: TensorRT) -> None:
    store(bundle, trt)
    trt.module.accept = False
    with pytest.raises(BackendError, match="failed in vision_encoder"):
        TensorRTBackend(bundle, cuda=SilentCuda(), tensorrt=trt)


def test_missing_engines_are_built_by_the_command(
    bundle: Bundle, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def build(command: list[str], **_options: Any) -> Any:
        commands.append(command)
        store(bundle, trt)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("vqbet_edge.runtime.backends.tensorrt.subprocess.run", build)
    TensorRTBackend(bundle, cuda=SilentCuda(), tensorrt=trt)
    wanted = ["vqbet_engines.cli", str(bundle.path), "--flavour", "tensorrt"]
    assert commands == [module_command(*wanted)]


def test_a_failed_build(bundle: Bundle, trt: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vqbet_edge.runtime.backends.tensorrt.subprocess.run",
        lambda *_command, **_options: SimpleNamespace(returncode=5),
    )
    with pytest.raises(BackendError, match=r"exit code 5.*vqbet-build"):
        TensorRTBackend(bundle, cuda=SilentCuda(), tensorrt=trt)


def test_a_tensorrt_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("__version__ = '8.5.2'\nclass Builder: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendError, match=r"8\.5\.2 is too old.*JetPack 6\.1"):
        import_tensorrt("tensorrt")
    sys.modules.pop("tensorrt", None)


def test_an_unknown_backend(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="tensorrt"):
        create_backend("nonsense", bundle)  # type: ignore[arg-type]


def test_auto_says_why_not_the_faster_ones(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    backends._say_once.cache_clear()
    chosen = create_backend("auto", bundle)
    line = caplog.messages[-1]
    assert line.startswith(f"backend: {chosen.name}")
    better = {"onnxruntime": ["tensorrt", "onnxruntime-cuda"], "tensorrt": []}
    assert all(f"not {name}: " in line for name in better.get(chosen.name, ["tensorrt"]))
