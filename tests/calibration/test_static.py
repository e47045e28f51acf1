"""The quantised graphs: what TensorRT asks of them, and what they compute."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from int8 import PUSHT, samples_for
from onnx import TensorProto, helper, numpy_helper
from vqbet_calibration.chain import Chain, encoder_feeds, gpt_feeds
from vqbet_calibration.graphs import GraphSession, layers, parts
from vqbet_calibration.static import Static, collect_ranges
from vqbet_engines import worker
from vqbet_engines.builder import GRAPH, JOB, TIMING, Job

from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.comparison import cosines
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.signatures import signature

# One worker runs the policy in floating point for all.
pytestmark = pytest.mark.xdist_group("calibration")
QUANTIZED: tuple[StageName, ...] = ("vision_encoder", "gpt")


@pytest.fixture(scope="module")
def chain(floating: Bundle) -> Chain:
    return Chain(floating, samples_for(floating, PUSHT).calibration)


@pytest.fixture(scope="module")
def signed(floating: Bundle) -> dict[StageName, Static]:
    calibration = samples_for(floating, PUSHT).calibration
    feeds = {"vision_encoder": encoder_feeds, "gpt": gpt_feeds}
    return {
        s: Static(g, "tensorrt", collect_ranges(g, feeds[s](floating, calibration)))
        for s, g in ((s, floating.graph(s)) for s in QUANTIZED)
    }


@pytest.fixture(scope="module")
def for_tensorrt(half: Bundle, signed: Mapping[StageName, Static]) -> dict[StageName, bytes]:
    """What a bundle has: INT8 with float16 around it."""
    return {
        s: q.of_twin(half.graph(s)).quantize(half.graph(s), dict.fromkeys(q.layers, "min-max"))
        for s, q in signed.items()
    }


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
    seen = set()
    for graph in for_tensorrt.values():
        model = onnx.load_from_string(graph)
        seen |= {node.op_type for node in model.graph.node}
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type in {"Softmax", "LayerNormalization"}:
                assert makers.get(node.input[0]) != "DequantizeLinear"
    assert {"Softmax", "LayerNormalization", "DequantizeLinear"} <= seen


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
            graph = quantizer.quantize(floating.graph(stage), {name: "min-max"})
            model = onnx.load_from_string(graph)
            weights = [w for w in model.graph.initializer if w.name.endswith(".weight_quantized")]
            assert [w.name for w in weights] == [f"{name}.weight_quantized"]
            assert len(model.graph.output) == len(signature(floating.manifest, stage).outputs)


@pytest.mark.parametrize("stage", QUANTIZED)
def test_parts_in_a_row_are_the_stage(
    floating: Bundle, signed: dict[StageName, Static], chain: Chain, stage: StageName
) -> None:
    """Every layer is in one of them, and can be quantised there."""
    whole = GraphSession(floating.graph(stage)).run_first(chain.inputs(stage))
    values, found = chain.inputs(stage), []
    for graph in parts(floating.graph(stage)):
        values = GraphSession(graph).run_all(values)
        names = [layer.name for layer in layers(onnx.load_from_string(graph))]
        assert names
        found += names
        assert signed[stage].quantize(graph, {names[0]: "min-max"}) != graph
    np.testing.assert_allclose(np.concatenate([v[0] for v in values]), whole, atol=1e-5)
    assert tuple(found) == signed[stage].layers


# What TensorRT's builder logs of the engine: every layer, its kind, and what it reads besides constants.
LAYER = re.compile(r"Name: .*?, LayerType: ([^,]+), Inputs: \[(.*?)\](?:, Constants|, Outputs)")


def layers_built(graph: bytes, capability: str, folder: Path) -> list[tuple[str, set[str]]]:
    """Kind and types of every layer of an engine that is built in this process."""
    said: list[str] = []

    def create_logger(tensorrt: Any, _: Any) -> Any:
        return real(tensorrt, lambda _level, text: said.append(text))

    job = Job("tensorrt_rtx", BuildOptions(optimization_level=1), capability)
    for name, data in ((GRAPH, graph), (JOB, msgspec.json.encode(job)), (TIMING, b"")):
        (folder / name).write_bytes(data)
    real = worker.create_logger
    with mock.patch.object(worker, "create_logger", create_logger), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as the worker's `main` does
        worker.build(folder)
    found = filter(None, map(LAYER.match, "\n".join(said).splitlines()))
    return [(m[1], set(re.findall(r"Datatype: (\w+)", m[2]))) for m in found]


@pytest.mark.parametrize("capability", ["sm86", pytest.param("sm120", marks=pytest.mark.extended)])
def test_convolutions_and_products_are_int8_in_the_engine(
    for_tensorrt: dict[StageName, bytes], signed: dict[StageName, Static], capability: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx")
    encoder, gpt = (layers_built(for_tensorrt[s], capability, tmp_path) for s in QUANTIZED)
    assert [types for kind, types in encoder if kind == "correlation"] == [{"Int8"}] * 21
    products = [types for kind, types in gpt if "gemm" in kind.lower()]
    assert sum("Int8" in types for types in products) >= len(signed["gpt"].layers) - 2


@pytest.mark.parametrize("stage", QUANTIZED)
def test_signed_graphs_compute_the_stage_as_they_are_written(
    floating: Bundle, for_tensorrt: dict[StageName, bytes], chain: Chain, stage: StageName
) -> None:
    """ONNX Runtime's optimiser computes pairs with float16 scales wrongly."""
    inputs, graph = chain.inputs(stage), for_tensorrt[stage]
    wanted = GraphSession(floating.graph(stage)).run_first(inputs)
    assert cosines(GraphSession(graph, optimize=False).run_first(inputs), wanted).min() > 0.995
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = dict(zip([value.name for value in plain.get_inputs()], inputs[0], strict=True))
    # Between casts values keep more than float16, so some are rounded to another of the levels.
    got, wanted = GraphSession(graph, optimize=False).run(feed)[0], plain.run(None, feed)[0]
    assert cosines(got, wanted).min() > 0.9995


def test_unsigned_encoder_computes_the_stage(floating: Bundle, chain: Chain) -> None:
    graph, inputs = floating.graph("vision_encoder"), chain.inputs("vision_encoder")
    feeds = encoder_feeds(floating, samples_for(floating, PUSHT).calibration)
    quantizer = Static(graph, "cpu", collect_ranges(graph, feeds))
    assert "heat_maps" not in quantizer.layers
    data = quantizer.quantize(graph, dict.fromkeys(quantizer.layers, "min-max"))
    wanted = GraphSession(graph).run_first(inputs)
    assert cosines(GraphSession(data).run_first(inputs), wanted).min() > 0.995
    # The optimiser's integer kernels compute what the graph says.
    assert cosines(GraphSession(data, optimize=False).run_first(inputs), wanted).min() > 0.995
    assert len(data) < len(graph) / 3
    # Weights have 7 bits: no kernel overflows, on any processor.
    model = onnx.load_from_string(data)
    weights = [w for w in model.graph.initializer if w.name.endswith(".weight_quantized")]
    assert len(weights) == len(quantizer.layers)
    assert max(np.abs(numpy_helper.to_array(w).astype(int)).max() for w in weights) == 64


def test_ranges_are_the_extremes(floating: Bundle) -> None:
    """Of the encoder's output, against NumPy."""
    calibration = samples_for(floating, PUSHT).calibration
    graph = floating.graph("vision_encoder")
    ranges = collect_ranges(graph, encoder_feeds(floating, calibration))
    model = onnx.load_from_string(graph)
    last = next(n for n in model.graph.node if n.name == layers(model)[-1].node)
    values = GraphSession(graph).run_first(Chain(floating, calibration).inputs("vision_encoder"))
    low, high = ranges[last.output[0]]
    assert (low, high) == pytest.approx((values.min(), values.max()), rel=1e-5)


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
    graph = model.SerializeToString()
    data = Static(graph, "tensorrt", {"x": (-2.54, 1.0)}).quantize(graph, {"w": "min-max"})
    found = {
        w.name: numpy_helper.to_array(w) for w in onnx.load_from_string(data).graph.initializer
    }
    scale = np.abs(weight).max(axis=1) / 127
    scale[3] = 1
    np.testing.assert_allclose(found["w.weight_scale"], scale, rtol=1e-6)
    np.testing.assert_array_equal(
        found["w.weight_quantized"], np.rint(weight / scale[:, None]).astype(np.int8)
    )
    assert found["x_scale"] == pytest.approx(0.02)
