"""ONNX graphs as this room sees them: what can be quantised, and running them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]

# Products with fewer rows, or columns, than the INT8 units work on gain nothing and cost accuracy.
MIN_WIDTH = 16
_FORWARDING = {"Cast", "Reshape", "Transpose"}


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with constant weights.

    Attributes:
        name: the module's, such as `blocks.0.query`; the same in every precision.
        node: name of its node.
        weight: name of its weights.
        axis: of the weights along which the outputs lie.
        feeds_softmax: its outputs are what a softmax is taken of.
    """

    name: str
    node: str
    weight: str
    axis: int
    feeds_softmax: bool


def layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers that are worth quantising, from the input on."""
    weights = {w.name: w for w in model.graph.initializer}
    readers = consumers(model)
    found = []
    for node in model.graph.node:
        if node.op_type not in {"Conv", "Gemm", "MatMul"} or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        axis = _output_axis(node, len(weight.dims))
        if min(weight.dims[axis], np.prod(weight.dims) // weight.dims[axis]) < MIN_WIDTH:
            continue
        name = weight.name if weight.name.endswith(".weight") else node.name
        softmax = _feeds(node.output[0], "Softmax", readers)
        found.append(Layer(name.removesuffix(".weight"), node.name, weight.name, axis, softmax))
    return found


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed else rank - 1


def consumers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor -> the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _feeds(tensor: str, kind: str, readers: Mapping[str, list[onnx.NodeProto]]) -> bool:
    """Whether a tensor reaches a node of a kind through nodes that do not compute."""
    return any(
        node.op_type == kind
        or (node.op_type in _FORWARDING and _feeds(node.output[0], kind, readers))
        for node in readers.get(tensor, [])
    )


def with_outputs(graph: bytes, tensors: Sequence[str]) -> bytes:
    """The graph with inner tensors as further outputs."""
    model = onnx.load_from_string(graph)
    known = {output.name for output in model.graph.output}
    for name in tensors:
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    data: bytes = model.SerializeToString()
    return data


class Session:
    """A graph in ONNX Runtime on the CPU.

    Args:
        graph: ONNX.
        outputs: which outputs to compute; None is all.
        optimize: let ONNX Runtime rewrite the graph first.
    """

    def __init__(
        self, graph: bytes, outputs: Sequence[str] | None = None, *, optimize: bool = True
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Others compute in between, PyTorch among them; spinning threads would take their cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimize:
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        self._outputs = None if outputs is None else list(outputs)

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """The outputs for inputs by name."""
        contiguous = {name: np.ascontiguousarray(value) for name, value in feed.items()}
        values: list[Array] = self._session.run(self._outputs, contiguous)
        return values


def initializer_array(model: onnx.ModelProto, name: str) -> Array:
    """A constant of the graph."""
    return next(numpy_helper.to_array(w) for w in model.graph.initializer if w.name == name)
