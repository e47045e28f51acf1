"""Weights in blocks of eight bits: what the nodes compute, and that a missing kernel is noticed."""

import logging
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from int8 import PUSHT, samples_for
from onnx import TensorProto, helper, numpy_helper
from vqbet_calibration import quantize as search
from vqbet_calibration.blocks import METHODS, Blocks
from vqbet_calibration.chain import Chain
from vqbet_calibration.graphs import GraphSession, layers

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.comparison import cosines

# One worker runs the policy in floating point for all.
pytestmark = pytest.mark.xdist_group("calibration")


@pytest.fixture(scope="module")
def chain(floating: Bundle) -> Chain:
    return Chain(floating, samples_for(floating, PUSHT).calibration)


def kinds(graph: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)


def test_a_size_of_blocks_per_layer(floating: Bundle, chain: Chain) -> None:
    """The rest stays in floating point, its weights in float16 on disk."""
    graph, inputs = floating.graph("gpt"), chain.inputs("gpt")
    names = Blocks(graph).layers
    chosen = dict(zip(names[:3], METHODS, strict=True))
    data = Blocks(graph).quantize(graph, chosen)
    model = onnx.load_from_string(data)
    sizes = [
        attribute.i
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "block_size"
    ]
    assert sorted(sizes) == [32, 64, 128]
    assert kinds(data)["Cast"] - kinds(graph)["Cast"] == len(names) - 3
    wanted, got = (GraphSession(g).run_first(inputs) for g in (graph, data))
    assert cosines(got, wanted).min() > 0.999
    assert Blocks(graph).quantize(graph, {}) == graph
    every = Blocks(graph).quantize(graph, dict.fromkeys(names, METHODS[-1]))
    assert kinds(every)["MatMulNBits"] == len(names)
    assert cosines(GraphSession(every).run_first(inputs), wanted).min() > 0.995
    assert len(every) < len(graph) / 2.5


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
@pytest.mark.parametrize("method", METHODS)
def test_every_weight_and_value_is_off_by_half_a_step(kind: str, method: str) -> None:
    """By hand; the transformer has open axes, its rows are 3 to 15 tokens."""
    size = int(method.rsplit(maxsplit=1)[-1])
    random = np.random.default_rng(0)
    weight = random.normal(size=(256, 48)).astype(np.float32)
    stored = weight if kind == "MatMul" else np.ascontiguousarray(weight.T)
    borders = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 256]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 48]),
    ]
    attributes = {} if kind == "MatMul" else {"transB": 1}
    node = helper.make_node(kind, ["x", "w.weight"], ["y"], name="product", **attributes)
    body = helper.make_graph(
        [node], "g", borders[:1], borders[1:], [numpy_helper.from_array(stored, "w.weight")]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    graph = model.SerializeToString()
    session = GraphSession(Blocks(graph).quantize(graph, {"w": method}))
    for tokens in (3, 15):
        x = random.normal(size=(tokens, 256)).astype(np.float32)
        x_blocks = np.abs(x).reshape(tokens, -1, size).astype(np.float64)
        w_blocks = np.abs(weight).reshape(-1, size, 48).astype(np.float64)
        x_step = x_blocks.max(axis=2) / 127  # (tokens, blocks)
        w_step = w_blocks.max(axis=1) / 127  # (blocks, 48)
        of_weights = np.einsum("tbk,bc->tc", x_blocks, w_step / 2)
        of_values = np.einsum("tb,bkc->tc", x_step / 2, w_blocks)
        both = size * np.einsum("tb,bc->tc", x_step / 2, w_step / 2)
        bound = (of_weights + of_values + both) * 1.02
        exact = x.astype(np.float64) @ weight
        assert (np.abs(session.run({"x": x})[0] - exact) <= bound).all()


def test_an_old_runtime_is_refused(floating: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.21.1")
    graph = floating.graph("gpt")
    name = layers(onnx.load_from_string(graph))[0].name
    with pytest.raises(UsageError, match=r"1\.22 or newer, on the robot too.*1\.21\.1.*--upgrade"):
        Blocks(graph).quantize(graph, {name: METHODS[0]})


def test_a_missing_kernel_is_noted(floating: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "has_kernel_for_blocks", lambda _: False)
    (note,) = search.quantize(floating, samples_for(floating, PUSHT), ("cpu",))[0].notes
    assert "no fast kernel" in note


def test_the_process_does_not_begin_to_log() -> None:
    """Being imported, ONNX Runtime's quantiser sets up the root logger."""
    script = (
        "import logging, vqbet_calibration.blocks as b;"
        "print(logging.getLogger().handlers, logging.getLogger().level)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == f"[] {logging.WARNING}", done.stderr
