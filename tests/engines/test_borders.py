"""A graph or an engine is bound to buffers only when its own tensors are those of the manifest."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from silent_cuda import SilentCuda
from sizes import SMALL

from vqbet_edge.errors import BackendError, BundleError
from vqbet_edge.runtime.backends import onnxruntime_cuda
from vqbet_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from vqbet_edge.runtime.backends.tensorrt import _check_borders
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageSpec, TensorSpec

onnxruntime = pytest.importorskip("onnxruntime")


class Session:
    """A session on the CPU that says that it is on the GPU, and records what is bound to it."""

    bound: list[str]

    def __init__(self, graph: bytes, *_arguments: Any, **_options: Any) -> None:
        real = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> Any:
        def bind(name: str, *_place: Any) -> None:
            self.bound.append(name)

        return SimpleNamespace(bind_input=bind, bind_output=bind)

    def run_with_iobinding(self, *_arguments: Any) -> None: ...


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
    return names


@pytest.fixture
def bundle(make_bundle: Any) -> Bundle:
    return make_bundle("fp32", **SMALL)


def changed(bundle: Bundle, stage: str, tensor: str, **changes: Any) -> Any:
    """The bundle with another manifest: a tensor of one stage, where it is an input, differs."""
    spec = bundle.manifest.stages[stage]  # type: ignore[index]
    inputs = tuple(
        msgspec.structs.replace(t, **changes) if t.name == tensor else t for t in spec.inputs
    )
    stages = bundle.manifest.stages | {stage: msgspec.structs.replace(spec, inputs=inputs)}
    manifest = msgspec.structs.replace(bundle.manifest, stages=stages)
    return SimpleNamespace(
        path=bundle.path,
        manifest=manifest,
        stages_to_load=bundle.stages_to_load,
        graph=bundle.graph,
    )


def test_what_the_exporter_writes_is_bound(bundle: Bundle, bound: list[str]) -> None:
    OnnxRuntimeCudaBackend(bundle, cuda=SilentCuda())
    specs = bundle.manifest.stages.values()
    assert sorted(bound) == sorted(t.name for s in specs for t in (*s.inputs, *s.outputs))


@pytest.mark.parametrize(
    "changes", [{"shape": (1, 1, 1)}, {"shape": (1, 5, 2, 1)}, {"dtype": "uint8"}]
)
def test_a_graph_with_other_borders(
    bundle: Bundle, bound: list[str], changes: dict[str, Any]
) -> None:
    with pytest.raises(BackendError, match=r"gpt.*states.*expected.*export"):
        OnnxRuntimeCudaBackend(changed(bundle, "gpt", "states", **changes), cuda=SilentCuda())
    assert "states" not in bound
    assert "feature" not in bound


@pytest.mark.usefixtures("bound")
def test_stages_that_disagree_get_no_buffer(bundle: Bundle) -> None:
    """One buffer carries `feature` from the GPT to the heads; it cannot have two sizes."""
    cuda = SilentCuda()
    with pytest.raises(BundleError, match=r"'feature'.*export"):
        OnnxRuntimeCudaBackend(changed(bundle, "code_heads", "feature", shape=(1, 1)), cuda=cuda)
    assert cuda.allocations == 0


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
    spec = StageSpec("gpt.onnx", "fp32", (TensorSpec("x", "float32", (1,)),), ())
    with pytest.raises(BackendError, match=r"BF16.*expected"):
        _check_borders(SimpleNamespace(nptype=nptype), engine, "gpt", spec)
