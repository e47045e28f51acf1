"""Weights in blocks of eight bits, a scale per block, by ONNX Runtime's quantiser for MatMulNBits.

Activations are quantised at run time, in the same blocks, so nothing is calibrated. A transformer
that sees one or a few tokens at a time is bound by reading its weights, and this is a quarter of
them. Ours is only what the quantiser lacks: it takes products, and PyTorch exports Gemm.
"""

import logging
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from vqbet_calibration.graphs import Layer, Quantizer, is_transposed, layers
from vqbet_edge.errors import UsageError

# Being imported, the quantiser makes the whole process log to stderr; and it reports every node.
_root = logging.getLogger()
_handlers, _level = _root.handlers[:], _root.level
from onnxruntime.quantization import matmul_nbits_quantizer as nbits  # noqa: E402

_root.handlers[:] = _handlers
_root.setLevel(_level)
nbits.logger.setLevel(logging.WARNING)

# By the size of the blocks, the cheapest first.
METHODS = ("blocks of 128", "blocks of 64", "blocks of 32")
# Before, there were kernels for four bits only, or they were slow.
OLDEST_RUNTIME = (1, 22)
# Inputs in eight bits; every other level has no fast kernel for weights of eight bits.
_ACCURACY_LEVEL = 4


class Blocks(Quantizer):
    """One stage, its weights quantised in blocks.

    Raises:
        UsageError: ONNX Runtime is too old, when it quantises.
    """

    methods = METHODS

    def _quantized(
        self, model: onnx.ModelProto, found: Sequence[Layer], chosen: Mapping[str, str]
    ) -> onnx.ModelProto:
        installed = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
        if installed < OLDEST_RUNTIME:
            raise UsageError(
                f"INT8 for CPUs needs ONNX Runtime 1.22 or newer, on the robot too; here is "
                f"{onnxruntime.__version__}; type: pip install --upgrade onnxruntime"
            )
        _halve_weights(model, {x.node for x in layers(model) if x.name not in chosen})
        _gemms_to_products(model, {layer.node for layer in found})
        for method in METHODS:
            config = nbits.DefaultWeightOnlyQuantConfig(
                block_size=int(method.removeprefix("blocks of ")),
                is_symmetric=True,
                accuracy_level=_ACCURACY_LEVEL,
                bits=8,
            )
            names = {layer.node for layer in found if chosen[layer.name] == method}
            others = [node.name for node in model.graph.node if node.name not in names]
            nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config).process()
        return model


def _gemms_to_products(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Nodes of these names become a MatMul of the same name and an Add."""
    weights = {w.name: w for w in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name not in names or node.op_type != "Gemm":
            nodes.append(node)
            continue
        source, weight, *bias = node.input
        if is_transposed(node):
            columns = np.ascontiguousarray(numpy_helper.to_array(weights[weight]).T)
            weights[weight].CopyFrom(numpy_helper.from_array(columns, weight))
        output = node.output[0]
        product = f"{output}.product" if bias else output
        nodes.append(helper.make_node("MatMul", [source, weight], [product], node.name))
        if bias:
            name = f"{node.name}.bias"
            nodes.append(helper.make_node("Add", [product, *bias], [output], name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _halve_weights(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Keep the weights of nodes in float16; ONNX Runtime makes them float32 when it loads them.

    What stays in floating point is most of the file otherwise.
    """
    weights = {w.name: w for w in model.graph.initializer}
    casts: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name in names:
            name = node.input[1]
            half = numpy_helper.to_array(weights[name]).astype(np.float16)
            weights[name].CopyFrom(numpy_helper.from_array(half, name))
            node.input[1] = f"{name}.float"
            casts.append(
                helper.make_node("Cast", [name], [node.input[1]], to=onnx.TensorProto.FLOAT)
            )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
