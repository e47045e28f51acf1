"""The quantised graphs: what TensorRT asks of them, and what they compute."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from int8 import PUSHT, samples_for
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as onnxruntimes_dynamic
from vqbet_calibration.chain import Chain
from vqbet_calibration.graphs import Session, layers
from vqbet_calibration.placement import quantize_dynamic, quantize_signed
from vqbet_calibration.quantizers import Static
from vqbet_calibration.ranges import Range
from vqbet_engines.builder import Job, build_plan
from vqbet_engines.layers import Layer, parse_layers

from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName

QUANTIZED: tuple[StageName, ...] = ("vision_encoder", "gpt")


@pytest.fixture(scope="module")
def chain(floating: Bundle) -> Chain:
    return Chain(floating, samples_for(floating, PUSHT).calibration)


@pytest.fixture(scope="module")
def signed(floating: Bundle, chain: Chain) -> dict[StageName, Static]:
    return {s: Static.calibrate(floating.graph(s), "tensorrt", chain.feeds(s)) for s in QUANTIZED}


@pytest.fixture(scope="module")
def for_tensorrt(half: Bundle, signed: Mapping[StageName, Static]) -> dict[StageName, bytes]:
    """What a bundle has: INT8 with float16 around it."""
    return {s: q.quantize(q.layers, "percentile", half.graph(s)) for s, q in signed.items()}


@pytest.mark.parametrize("stage", QUANTIZED)
def test_what_the_parser_refuses_is_not_there(
    for_tensorrt: dict[StageName, bytes], stage: StageName
) -> None:
    """TensorRT: signed symmetric, zero points 0, constant scales, no quantised biases."""
    model = onnx.load_from_string(for_tensorrt[stage])
    constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert pairs
    for node in pairs:
        _, scale, zero_point = node.input
        assert constants[scale].dtype == np.float16
        assert (constants[scale] > 0).all()
        assert constants[zero_point].dtype == np.int8
        assert not constants[zero_point].any()
    weights = [constants[n.input[0]] for n in pairs if n.input[0] in constants]
    assert {w.dtype for w in weights} == {np.dtype(np.int8)}
    assert all(w.ndim >= 2 for w in weights)


def test_softmax_and_norms_stay_in_floating_point(for_tensorrt: dict[StageName, bytes]) -> None:
    for graph in for_tensorrt.values():
        model = onnx.load_from_string(graph)
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type in {"Softmax", "LayerNormalization"}:
                assert makers.get(node.input[0]) != "DequantizeLinear"


def test_residual_additions_read_a_quantised_operand(for_tensorrt: dict[StageName, bytes]) -> None:
    """And the other one comes straight from the convolution that the addition fuses with."""
    model = onnx.load_from_string(for_tensorrt["vision_encoder"])
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    constants = {w.name for w in model.graph.initializer}
    additions = [n for n in model.graph.node if n.op_type == "Add" and not constants & {*n.input}]
    assert additions
    for node in additions:
        assert sorted(makers[name] for name in node.input) == ["Conv", "DequantizeLinear"]


def test_every_layer_can_be_quantised_alone(
    floating: Bundle, signed: dict[StageName, Static]
) -> None:
    for stage, quantizer in signed.items():
        for name in quantizer.layers:
            model = onnx.load_from_string(quantizer.quantize([name], "min-max"))
            weights = [w for w in model.graph.initializer if w.name.endswith(".weight.quantized")]
            assert [w.name for w in weights] == [f"{name}.weight.quantized"]
            assert len(model.graph.output) == len(floating.manifest.stages[stage].outputs)


def build(graph: bytes, capability: str) -> tuple[Layer, ...]:
    pytest.importorskip("tensorrt_rtx")
    job = Job("tensorrt_rtx", BuildOptions(optimization_level=1), capability)
    return parse_layers(build_plan(graph, job).layers)


@pytest.mark.parametrize("capability", ["sm86", "sm120"])
def test_convolutions_are_int8_in_the_engine(
    for_tensorrt: dict[StageName, bytes], capability: str
) -> None:
    found = build(for_tensorrt["vision_encoder"], capability)
    convolutions = [layer for layer in found if layer.is_convolution]
    assert len(convolutions) == 21
    assert Counter(t for layer in convolutions for t in set(layer.inputs)) == {"INT8": 21}


@pytest.mark.parametrize("capability", ["sm86", "sm120"])
def test_matrix_products_are_int8_in_the_engine(
    for_tensorrt: dict[StageName, bytes], signed: dict[StageName, Static], capability: str
) -> None:
    found = build(for_tensorrt["gpt"], capability)
    products = [layer for layer in found if "gemm" in layer.kind.lower()]
    assert sum("INT8" in layer.inputs for layer in products) >= len(signed["gpt"].layers) - 2


@pytest.mark.parametrize("stage", QUANTIZED)
def test_signed_graphs_compute_the_stage(
    floating: Bundle,
    for_tensorrt: dict[StageName, bytes],
    chain: Chain,
    stage: StageName,
) -> None:
    graph = AsItStands(for_tensorrt[stage])
    assert smallest_cosine(Session(floating.graph(stage)), graph, chain.feeds(stage)) > 0.995


def test_unsigned_encoder_computes_the_stage(floating: Bundle, chain: Chain) -> None:
    feeds, graph = chain.feeds("vision_encoder"), floating.graph("vision_encoder")
    quantizer = Static.calibrate(graph, "cpu", feeds)
    assert "heat_maps" not in quantizer.layers
    data = quantizer.quantize(quantizer.layers, "min-max")
    wanted = Session(graph)
    assert smallest_cosine(wanted, Session(data), feeds) > 0.995
    # The optimiser's integer kernels compute what the graph says.
    assert smallest_cosine(wanted, AsItStands(data), feeds) > 0.995
    assert len(data) < len(graph) / 3


class AsItStands:
    """A graph without ONNX Runtime's optimiser, which computes float16 scales wrongly."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(graph, options)

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, {k: np.ascontiguousarray(v) for k, v in feed.items()})


def smallest_cosine(
    wanted: Session, got: Session | AsItStands, feeds: list[Mapping[str, np.ndarray]]
) -> float:
    pairs = [(wanted.run(f)[0].ravel(), got.run(f)[0].ravel()) for f in feeds]
    return min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs)


def test_dynamic_products_are_as_exact_as_onnxruntimes(floating: Bundle, chain: Chain) -> None:
    feeds, graph = chain.feeds("gpt"), floating.graph("gpt")
    names = [layer.name for layer in layers(onnx.load_from_string(graph))]
    ours = quantize_dynamic(graph, names)
    kinds = Counter(node.op_type for node in onnx.load_from_string(ours).graph.node)
    assert kinds["MatMulInteger"] == len(names)
    assert "Gemm" not in kinds
    # Queries, keys and values share one input, which is quantised once.
    assert kinds["DynamicQuantizeLinear"] < len(names)
    wanted, cosine = Session(graph), smallest_cosine(Session(graph), Session(ours), feeds)
    assert cosine > 0.995
    theirs = onnxruntimes(graph)
    assert 1 - cosine < 2 * (1 - smallest_cosine(wanted, Session(theirs), feeds))


def onnxruntimes(graph: bytes) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.onnx"
        onnxruntimes_dynamic(
            onnx.load_from_string(graph),
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return path.read_bytes()


def test_dynamic_shapes_and_products_without_bias() -> None:
    """The CPU's transformer has open axes; its rows are 3 to 15 tokens."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(32, 48)).astype(np.float32)
    borders = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", 32]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", 48]),
    ]
    node = helper.make_node("MatMul", ["x", "w.weight"], ["y"], name="product")
    body = helper.make_graph(
        [node], "g", borders[:1], borders[1:], [numpy_helper.from_array(weight, "w.weight")]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = Session(quantize_dynamic(model.SerializeToString(), ["w"]))
    for tokens in (3, 15):
        x = random.normal(size=(2, tokens, 32)).astype(np.float32)
        # Half a step of every weight and of every value, at the most.
        weight_step = np.abs(weight).max(axis=0) / 63
        value_step = (x.max() - x.min()) / 255
        bound = np.abs(x) @ np.ones_like(weight) * weight_step / 2
        bound += value_step / 2 * (np.abs(weight) + weight_step / 2).sum(axis=0)
        assert (np.abs(session.run({"x": x})[0] - x @ weight) <= bound + 1e-4).all()


def test_weights_are_rounded_to_the_nearest_level() -> None:
    """One layer by hand: int8 of weight / scale, a scale per output channel."""
    weight = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    weight[3] = 0
    borders = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16]) for n in ("x", "y")]
    node = helper.make_node("Gemm", ["x", "w.weight"], ["y"], name="layer", transB=1)
    body = helper.make_graph(
        [node], "g", borders[:1], borders[1:], [numpy_helper.from_array(weight, "w.weight")]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    data = quantize_signed(model.SerializeToString(), ["w"], {"w": Range(-2.54, 1)})
    found = {
        w.name: numpy_helper.to_array(w) for w in onnx.load_from_string(data).graph.initializer
    }
    scale = np.abs(weight).max(axis=1) / 127
    scale[3] = 1
    np.testing.assert_allclose(found["w.weight.scale"], scale, rtol=1e-6)
    np.testing.assert_array_equal(
        found["w.weight.quantized"], np.rint(weight / scale[:, None]).astype(np.int8)
    )
    assert found["x.scale"] == pytest.approx(0.02)
