"""What may and may not stand in an exported graph."""

import numpy as np
import onnx
import oracle
import pytest
import torch
from onnx import TensorProto, numpy_helper
from vqbet_export.graph import export_graph
from vqbet_export.stages import MASKED_SCORE
from workshop import Exported, Workshop

from vqbet_edge import VerificationError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import STAGES, Precision
from vqbet_edge.runtime.signatures import Signature, TensorSpec


def graphs(exported: Exported) -> dict[str, onnx.ModelProto]:
    bundle = Bundle.open(exported.bundle)
    return {stage: onnx.load_from_string(bundle.graph(stage)) for stage in STAGES}


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(workshop: Workshop, request: pytest.FixtureRequest) -> Exported:
    precision: Precision = request.param
    return workshop.bundle(oracle.TINY, precision)


def test_every_graph_suits_tensorrt_10_3_and_tells_nothing_of_the_machine(
    exported: Exported,
) -> None:
    """No randomness, no mask that breaks float16, BatchNorm folded, uint8 cast first."""
    for model in graphs(exported).values():
        assert [(o.domain, 17 <= o.version <= 20) for o in model.opset_import] == [("", True)]
        assert model.ir_version <= 9
        for value in (*model.graph.input, *model.graph.output):
            assert all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim)
            kinds = {TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64}
            assert value.type.tensor_type.elem_type in kinds
        text = model.SerializeToString()
        for word in (b"/home", b"/usr", b"/tmp", b"site-packages", b".py", b"location"):
            assert word not in text
        operators = {node.op_type for node in model.graph.node}
        forbidden = {"Multinomial", "RandomUniform", "ArgMax", "Where", "If", "Loop"}
        assert not operators & {*forbidden, "BatchNormalization"}
        for array in map(numpy_helper.to_array, model.graph.initializer):
            if np.issubdtype(array.dtype, np.floating):
                assert np.isfinite(array).all()
                assert array.min() >= MASKED_SCORE
    encoder = graphs(exported)["vision_encoder"]
    assert [n.op_type for n in encoder.graph.node if "frames" in n.input] == ["Cast"]


def test_float16_keeps_norms_and_softmax_in_float32(workshop: Workshop) -> None:
    seen = set()
    for model in graphs(workshop.bundle(oracle.TINY, "fp16")).values():
        seen |= {node.op_type for node in model.graph.node}
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        types |= {v.name: v.type.tensor_type.elem_type for v in inferred.graph.output}
        for node in model.graph.node:
            if node.op_type in {"LayerNormalization", "Softmax"}:
                assert types[node.output[0]] == TensorProto.FLOAT
            if node.op_type in {"Conv", "Gelu"}:
                assert types[node.output[0]] == TensorProto.FLOAT16
    assert {"LayerNormalization", "Softmax", "Conv", "Gelu"} <= seen


def test_only_the_newest_row_passes_the_last_block(workshop: Workshop) -> None:
    model = onnx.shape_inference.infer_shapes(graphs(workshop.bundle(oracle.TINY))["gpt"])
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info
    }
    rows = [shapes[n.output[0]][0] for n in model.graph.node if n.op_type == "Gelu"]
    # Two blocks over 5 x (camera, state, action query) tokens.
    assert rows == [15, 1]


def test_unknown_operators_are_refused() -> None:
    class Sorting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.topk(2).values

    x, y = TensorSpec("x", "float32", (1, 4)), TensorSpec("y", "float32", (1, 2))
    with pytest.raises(VerificationError, match="operators that no backend was tested with"):
        export_graph(Sorting(), Signature((x,), (y,)))


def test_operators_are_read_once_for_all_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's exporter would read the sources of all of them for each graph."""
    from torch.onnx._internal.exporter import _registration

    spec = TensorSpec("x", "float32", (1, 4)), TensorSpec("y", "float32", (1, 4))
    signature = Signature(spec[:1], spec[1:])
    before = export_graph(torch.nn.ReLU(), signature)

    def anew(*_: object) -> None:
        raise AssertionError("read once more")

    monkeypatch.setattr(_registration._torchlib_registry, "get_torchlib_ops", anew)
    assert export_graph(torch.nn.ReLU(), signature) == before
