"""ONNX Runtime's CUDA provider; and a graph or engine is bound only with the right I/O signature.

Sessions run on the CPU and say that they are on the GPU; their work goes to the fake driver's
stream.
"""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_driver import FakeDriver
from sizes import SMALL

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends import onnxruntime_cuda
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.cuda_execution import check_signature
from vqbet_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from vqbet_edge.runtime.backends.tensorrt import _tensors
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.signatures import Signature, TensorSpec, signature

onnxruntime = pytest.importorskip("onnxruntime")


class Session:
    """A session on the CPU that says that it is on the GPU, and records what is bound to it."""

    driver: FakeDriver
    bound: list[str]
    created = 0
    #: Whether it cannot be captured.
    uncapturable = False

    def __init__(self, graph: bytes, *_arguments: Any, providers: Any, **_options: Any) -> None:
        self.real = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self.options = providers[0][1]
        self.runs = 0
        type(self).created += 1

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> Any:
        real = self.real.io_binding()

        def bound(bind: Any) -> Any:
            def call(name: str, _device: str, *place: Any) -> None:
                self.bound.append(name)
                bind(name, "cpu", *place)

            return call

        binds = bound(real.bind_input), bound(real.bind_output)
        return SimpleNamespace(real=real, bind_input=binds[0], bind_output=binds[1])

    def run_with_iobinding(self, binding: Any, _options: Any) -> None:
        self.runs += 1
        if self.uncapturable and self.options["enable_cuda_graph"] == "1" and self.runs > 1:
            raise RuntimeError("cannot capture")
        stream = int(self.options["user_compute_stream"])
        self.driver.put(stream, lambda: self.real.run_with_iobinding(binding.real))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were bound."""
    module = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider"],
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        InferenceSession=Session,
    )
    names: list[str] = []
    monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: module)
    monkeypatch.setattr(Session, "bound", names, raising=False)
    monkeypatch.setattr(Session, "driver", FakeDriver(), raising=False)
    monkeypatch.setattr(Session, "created", 0)
    return names


@pytest.fixture
def bundle(make_bundle: Any) -> Bundle:
    return make_bundle("fp32", **SMALL)


def load(bundle: Any) -> OnnxRuntimeCudaBackend:
    return OnnxRuntimeCudaBackend(bundle, cuda=Cuda(Session.driver))


def with_precision(bundle: Bundle, precision: Any) -> Any:
    stages = {
        name: msgspec.structs.replace(spec, precision=precision)
        for name, spec in bundle.manifest.stages.items()
    }
    manifest = msgspec.structs.replace(bundle.manifest, stages=stages)
    return Bundle(bundle.path, manifest, bundle.contents, bundle.arrays)


def test_what_the_exporter_writes_is_bound_once(bundle: Bundle, bound: list[str]) -> None:
    backend = load(bundle)
    for _ in range(3):
        backend.create_window()
    tensors = [
        t.name for stage in bundle.stages_to_load for t in signature(bundle.manifest, stage).tensors
    ]
    assert sorted(bound) == sorted(tensors)
    assert Session.created == len(bundle.stages_to_load)


@pytest.mark.usefixtures("bound")
def test_windows_share_its_buffers_and_not_their_histories(bundle: Bundle) -> None:
    random = np.random.default_rng(0)
    shape = signature(bundle.manifest, "vision_encoder").inputs[0].shape[1:]
    states = np.zeros(signature(bundle.manifest, "gpt").inputs[1].shape[1:], np.float32)
    frames = [random.integers(0, 256, shape, np.uint8) for _ in range(2)]

    def seen(window: Any, frame: Any) -> Any:
        window.encode(frame, len(states) - 1)
        window.fill()
        return window

    alone = [seen(load(bundle).create_window(), f).predict(states).offsets.copy() for f in frames]
    backend = load(bundle)
    windows = [seen(backend.create_window(), frame) for frame in frames]
    together = [window.predict(states).offsets for window in windows]
    np.testing.assert_array_equal(together, alone)
    assert not np.array_equal(*alone)
    backend.close()
    assert not Session.driver.misuses


@pytest.mark.usefixtures("bound")
def test_int8_is_refused(bundle: Bundle) -> None:
    """ONNX Runtime's optimiser computes such graphs wrongly on the CPU; nobody proved the GPU."""
    with pytest.raises(BackendError, match=r"INT8.*use TensorRT, the backend 'onnxruntime'"):
        load(with_precision(bundle, "int8"))
    assert Session.created == 0
    assert Session.driver.retained == 0


@pytest.mark.usefixtures("bound")
def test_without_its_cuda_graphs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Session, "uncapturable", True)
    backend = load(bundle)
    assert any("without CUDA graphs" in m and "cannot capture" in m for m in caplog.messages)
    books = Session.driver.books
    backend.close()
    assert books["memory"] > 0
    assert not any(Session.driver.books.values())


@pytest.mark.parametrize(
    "changes", [{"shape": (1, 1, 1)}, {"shape": (1, 5, 2, 1)}, {"dtype": "uint8"}]
)
def test_a_graph_with_another_signature(
    bundle: Bundle, bound: list[str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def other(manifest: Any, stage: Any) -> Signature:
        true = signature(manifest, stage)
        inputs = (t._replace(**changes) if t.name == "states" else t for t in true.inputs)
        return Signature(tuple(inputs), true.outputs)

    monkeypatch.setattr("vqbet_edge.runtime.backends.cuda_backend.signature", other)
    with pytest.raises(BackendError, match=r"gpt.*states.*expected.*export"):
        load(bundle)
    assert "states" not in bound
    assert "feature" not in bound
    assert not any(Session.driver.books.values())


def test_an_engine_of_a_type_that_numpy_lacks() -> None:
    """TensorRT's `nptype` raises for BF16 and FP8."""

    def nptype(_dtype: Any) -> Any:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")

    engine = SimpleNamespace(
        num_io_tensors=1,
        get_tensor_name=lambda _index: "x",
        get_tensor_dtype=lambda _name: "DataType.BF16",
        get_tensor_shape=lambda _name: (1,),
    )
    have = _tensors(SimpleNamespace(nptype=nptype), engine)
    with pytest.raises(BackendError, match=r"BF16.*expected"):
        check_signature("the engine", have, Signature((TensorSpec("x", "float32", (1,)),), ()))
