"""Whether products of weights in blocks are fast here, told by what is computed and not by time."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from vqbet_calibration.blocks import nbits

from vqbet_edge.runtime.backends.kernels import PROBE, has_kernel_for_blocks, rounds_inputs

# At every other one there is no kernel for weights of eight bits.
LEVEL_OF_THE_EXPORT = 4


def product(level: int, block: int = 128) -> bytes:
    """A product by ONNX Runtime's own quantiser, as the exporter has it make them."""
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 128]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1]),
    ]
    weights = numpy_helper.from_array(np.ones((128, 1), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    body = helper.make_graph([node], "probe", values[:1], values[1:], [weights])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    config = nbits.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=True, accuracy_level=level, bits=8
    )
    quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    data: bytes = quantizer.model.model.SerializeToString(deterministic=True)
    return data


def test_the_probe_is_what_the_exporter_makes() -> None:
    """If it is not: PROBE.write_bytes(product(LEVEL_OF_THE_EXPORT))."""
    made, kept = (onnx.load_from_string(d) for d in (product(4), PROBE.read_bytes()))
    assert kept.graph == made.graph
    assert [node.op_type for node in kept.graph.node] == ["MatMulNBits"]


def test_rounding_is_noticed_on_every_processor() -> None:
    """Where there is no kernel, nothing else here says so: this graph rounds by itself."""
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 128]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1]),
    ]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["rounded"]),
        helper.make_node("MatMul", ["rounded", "w"], ["y"]),
    ]
    weights = numpy_helper.from_array(np.ones((128, 1), np.float32), "w")
    body = helper.make_graph(nodes, "rounds", values[:1], values[1:], [weights])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert rounds_inputs(onnxruntime, model.SerializeToString())


@pytest.mark.parametrize("block", [32, 128])
def test_a_missing_kernel_is_noticed(block: int) -> None:
    """At another level of accuracy there is none on any processor."""
    for level in (0, 1):
        assert not rounds_inputs(onnxruntime, product(level, block))
    here = has_kernel_for_blocks(onnxruntime)
    assert rounds_inputs(onnxruntime, product(LEVEL_OF_THE_EXPORT, block)) == here
