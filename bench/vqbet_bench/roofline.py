"""The roofline: what a stage has to read and to compute at the least, and how long that takes.

S. Williams, A. Waterman, D. Patterson: "Roofline: an insightful visual performance model for
multicore architectures", 2009. Of the memory traffic only the weights are counted, once per run:
activations of a batch of one fit into caches.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import onnx
from onnx import numpy_helper

from vqbet_bench.results import Ceilings, StageBound
from vqbet_edge.bundle import Bundle

Shapes = Mapping[str, tuple[int, ...]]


class Cost(NamedTuple):
    """Of one run of a graph."""

    weight_bytes: int
    multiply_adds: int


def graph_cost(data: bytes) -> Cost:
    """Count a graph with fixed shapes.

    Raises:
        ValueError: an operator with weights of its own is not known here, so nothing is counted
            rather than too little.
    """
    model = onnx.load_from_string(data)
    for node in model.graph.node:
        _check_known(node)
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    weights = sum(map(_bytes, (*graph.initializer, *_constants(graph))))
    return Cost(weights, sum(_multiply_adds(node, shapes) for node in graph.node))


def _constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    return [a.t for node in nodes for a in node.attribute if a.name == "value"]


def _bytes(tensor: onnx.TensorProto) -> int:
    return int(numpy_helper.to_array(tensor).nbytes)


def _check_known(node: onnx.NodeProto) -> None:
    hidden = node.op_type in {"Attention", "Einsum", "GRU", "LSTM"}
    if hidden or node.domain not in {"", "ai.onnx"}:
        raise ValueError(f"the arithmetic of {node.op_type} is not known")


def _multiply_adds(node: onnx.NodeProto, shapes: Shapes) -> int:
    counter = _COUNTERS.get(node.op_type)
    return counter(node, shapes) if counter is not None else 0


def _convolution(weight: int) -> Callable[[onnx.NodeProto, Shapes], int]:
    """Each output value sums over input channels of its group and the kernel."""
    return lambda node, shapes: (
        math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[weight]][1:])
    )


def _product(left: int) -> Callable[[onnx.NodeProto, Shapes], int]:
    """Each output value sums over the left operand's last axis."""
    return lambda node, shapes: math.prod(shapes[node.output[0]]) * shapes[node.input[left]][-1]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    inner = shapes[node.input[0]][0 if transposed else 1]
    return math.prod(shapes[node.output[0]]) * inner


_COUNTERS: dict[str, Callable[[onnx.NodeProto, Shapes], int]] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "MatMul": _product(0),
    "MatMulInteger": _product(0),
    "QLinearMatMul": _product(0),
    "Gemm": _gemm,
}


def stage_bound(
    cost: Cost, precision: str, ceilings: Ceilings, seconds: float | None
) -> StageBound:
    """A stage's bound under the hardware's ceilings."""
    flops = ceilings.flops.get(precision)
    return StageBound(
        weight_bytes=cost.weight_bytes,
        multiply_adds=cost.multiply_adds,
        seconds=seconds,
        memory_bound=cost.weight_bytes / ceilings.bytes_per_second,
        compute_bound=2 * cost.multiply_adds / flops if flops else None,
    )


def bundle_weights(bundle: Bundle) -> int:
    """Bytes of all the weights that acting needs."""
    return sum(graph_cost(bundle.graph(stage)).weight_bytes for stage in bundle.stages_to_load)


def bundle_bounds(
    bundle: Bundle, ceilings: Ceilings, seconds: Mapping[str, float]
) -> dict[str, StageBound]:
    """Every stage that acting needs."""
    return {
        stage: stage_bound(
            graph_cost(bundle.graph(stage)),
            bundle.manifest.stages[stage].precision,
            ceilings,
            seconds.get(stage),
        )
        for stage in bundle.stages_to_load
    }
