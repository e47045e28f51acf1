"""The roofline: what a stage has to read and to compute at the least, and how long that takes.

S. Williams, A. Waterman, D. Patterson: "Roofline: an insightful visual performance model for
multicore architectures", 2009. Of the memory traffic only the weights are counted, once per run:
activations of a batch of one fit into caches.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import onnx
from onnx import TensorProto, helper, numpy_helper

from vqbet_bench.results import Bound, Ceilings
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Precision, StageName
from vqbet_edge.runtime.signatures import Signature, cached_gpt_signature

Shapes = Mapping[str, tuple[int, ...]]
_HIDDEN = {"Attention", "Einsum", "GRU", "LSTM"}


class Cost(NamedTuple):
    """Of one run of a graph."""

    weight_bytes: int
    multiply_adds: int


class Run(NamedTuple):
    """A run of a graph at given shapes.

    Attributes:
        stage: whose graph it is; runs of one stage share their weights.
        precision: of its arithmetic.
        cost: of the run.
    """

    stage: StageName
    precision: Precision
    cost: Cost


def graph_cost(data: bytes, inputs: Shapes | None = None) -> Cost:
    """Count a graph.

    Args:
        data: the ONNX file.
        inputs: shapes of the inputs, where the graph leaves them open.

    Raises:
        ValueError: the arithmetic of an operator, or a shape, is not known here, so nothing is
            counted rather than too little.
    """
    model = onnx.load_from_string(data)
    weights = sum(map(_bytes, (*model.graph.initializer, *_constants(model.graph).values())))
    _spell_out_blocks(model.graph)
    if inputs:
        for value in model.graph.input:
            if value.name in inputs:
                _fix_shape(value, inputs[value.name])
        del model.graph.value_info[:]
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
        if all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes |= {name: tuple(tensor.dims) for name, tensor in _constants(graph).items()}
    return Cost(weights, sum(_multiply_adds(node, shapes) for node in graph.node))


def _fix_shape(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    return {node.output[0]: a.t for node in nodes for a in node.attribute if a.name == "value"}


def _spell_out_blocks(graph: onnx.GraphProto) -> None:
    """ONNX infers the shape of a MatMul, not of ONNX Runtime's product with blocks of weights."""
    for node in graph.node:
        if (node.domain, node.op_type) != ("com.microsoft", "MatMulNBits"):
            continue
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        name = f"{node.output[0]}.weights"
        shape = [sizes["K"], sizes["N"]]
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        inputs, outputs = [node.input[0], name], list(node.output)
        node.CopyFrom(helper.make_node("MatMul", inputs, outputs))


def _bytes(tensor: onnx.TensorProto) -> int:
    return int(numpy_helper.to_array(tensor).nbytes)


def _multiply_adds(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Of one node: each output value is a sum over so many products."""
    if node.op_type in _HIDDEN or node.domain not in {"", "ai.onnx"}:
        raise ValueError(f"the arithmetic of {node.op_type} is not known")
    try:
        match node.op_type:
            case "Conv" | "ConvInteger":  # input channels of the group, and the kernel
                terms = math.prod(shapes[node.input[1]][1:])
            case "QLinearConv":
                terms = math.prod(shapes[node.input[3]][1:])
            case "MatMul" | "MatMulInteger" | "QLinearMatMul":
                terms = shapes[node.input[0]][-1]
            case "Gemm":
                transposed = any(a.name == "transA" and a.i for a in node.attribute)
                terms = shapes[node.input[0]][0 if transposed else 1]
            case _:
                return 0
        return math.prod(shapes[node.output[0]]) * terms
    except KeyError as error:
        raise ValueError(f"the shape of {error} is not known") from error


def stage_runs(bundle: Bundle, *, on_processor: bool, prefilled: bool) -> dict[str, Run]:
    """The runs of graphs that a prediction consists of.

    Args:
        bundle: the graphs.
        on_processor: whether it takes the graphs for processors.
        prefilled: whether there `gpt` runs on the newest tokens, `prefill` on the others before.

    Raises:
        ValueError: see `graph_cost`.
    """
    runs: dict[str, Run] = {}
    for stage in bundle.stages_to_load:
        spec = bundle.manifest.graphs("cpu" if on_processor else "tensorrt")[stage]
        if not on_processor:
            runs[stage] = Run(stage, spec.precision, graph_cost(bundle.graph(stage)))
            continue
        graph = bundle.cpu_graph(stage)
        shapes: dict[str, Shapes | None] = {stage: None}
        if stage == "gpt":
            shapes = _gpt_shapes(cached_gpt_signature(bundle.manifest), prefilled=prefilled)
        for name, inputs in shapes.items():
            runs[name] = Run(stage, spec.precision, graph_cost(graph, inputs))
    return runs


def _gpt_shapes(longest: Signature, *, prefilled: bool) -> dict[str, Shapes | None]:
    """Inputs of the processor's GPT for each of its runs."""
    full = {tensor.name: tensor.shape for tensor in longest.inputs}
    window, per_step, width = full["constants"]

    def shapes(steps: int, known: int) -> Shapes:
        rows = steps * per_step
        return {
            "image_tokens": (1, steps, *full["image_tokens"][2:]),
            "states": (1, steps, *full["states"][2:]),
            "constants": (steps, per_step, width),
            "mask": (rows, known + rows),
            "past": (*full["past"][:3], known, full["past"][4]),
        }

    if not prefilled:
        return {"gpt": shapes(window, 0)}
    return {"gpt": shapes(1, (window - 1) * per_step), "prefill": shapes(window - 1, 0)}


def total_weights(runs: Mapping[str, Run]) -> int:
    """Bytes of all the weights, each graph's once."""
    return sum({run.stage: run.cost.weight_bytes for run in runs.values()}.values())


def bound(run: Run, ceilings: Ceilings, seconds: float | None) -> Bound:
    """A run's bound under the hardware's ceilings, and the seconds that it took."""
    flops = ceilings.flops.get(run.precision)
    return Bound(
        weight_bytes=run.cost.weight_bytes,
        multiply_adds=run.cost.multiply_adds,
        seconds=seconds,
        memory_bound=run.cost.weight_bytes / ceilings.bytes_per_second,
        compute_bound=2 * run.cost.multiply_adds / flops if flops else None,
    )
