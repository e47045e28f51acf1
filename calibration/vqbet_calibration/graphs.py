"""ONNX graphs as this package sees them: what can be quantised, their parts, and running them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx.utils import Extractor

Array = NDArray[Any]
Feed = Mapping[str, Array]

# Products with fewer rows, or columns, than the INT8 units work on gain nothing and cost accuracy.
MIN_WIDTH = 16
_FORWARDING = {"Cast", "Reshape", "Transpose"}
# Nodes that no part begins with: they belong to the layer before them.
_FOLLOWING = {"Relu", "MaxPool", *_FORWARDING}


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with constant weights.

    Attributes:
        name: the module's, such as `blocks.0.query`; the same in every precision.
        node: name of its node.
        before_softmax: its outputs are what a softmax is taken of.
    """

    name: str
    node: str
    before_softmax: bool


def layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers that are worth quantising, from the input on."""
    weights = {w.name: w for w in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.op_type not in {"Conv", "Gemm", "MatMul"} or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        outputs = weight.dims[0 if node.op_type == "Conv" or is_transposed(node) else -1]
        if min(outputs, np.prod(weight.dims) // outputs) < MIN_WIDTH:
            continue
        name = weight.name if weight.name.endswith(".weight") else node.name
        softmax = _reaches_softmax(node.output[0], readers)
        found.append(Layer(name.removesuffix(".weight"), node.name, softmax))
    return found


@dataclass(frozen=True)
class Quantizer(ABC):
    """One stage and one way of quantising it.

    Attributes:
        graph: float32 ONNX.
    """

    graph: bytes

    @property
    @abstractmethod
    def methods(self) -> tuple[str, ...]:
        """What may be done to a layer, the cheapest first, the most exact last."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that can be quantised, from the input on."""
        return tuple(layer.name for layer in layers(onnx.load_from_string(self.graph)))

    def of_twin(self, graph: bytes) -> "Quantizer":
        """The same for another graph with the same layers, such as the float16 one."""
        return replace(self, graph=graph)

    def quantize(self, graph: bytes, chosen: Mapping[str, str]) -> bytes:
        """Quantise the stage's graph, or a part of it.

        Args:
            graph: float32 ONNX.
            chosen: layer -> method; the others stay in floating point.
        """
        model = onnx.load_from_string(graph)
        found = [layer for layer in layers(model) if layer.name in chosen]
        if not found:
            return graph
        data: bytes = self._quantized(model, found, chosen).SerializeToString(deterministic=True)
        return data

    @abstractmethod
    def _quantized(
        self, model: onnx.ModelProto, found: Sequence[Layer], chosen: Mapping[str, str]
    ) -> onnx.ModelProto:
        """The model, which may be changed, with these layers quantised."""


def is_transposed(gemm: onnx.NodeProto) -> bool:
    """Whether a Gemm's weights are (outputs, inputs)."""
    return any(a.name == "transB" and a.i for a in gemm.attribute)


def _reaches_softmax(tensor: str, readers: Mapping[str, list[onnx.NodeProto]]) -> bool:
    """Through nodes that do not compute."""
    return any(
        node.op_type == "Softmax"
        or (node.op_type in _FORWARDING and _reaches_softmax(node.output[0], readers))
        for node in readers.get(tensor, [])
    )


def parts(graph: bytes) -> list[bytes]:
    """Cut a graph where a single tensor goes on: the output of a part is the next one's input.

    Every part has layers.
    """
    model = onnx.load_from_string(graph)
    borders = _borders(model)
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    extractor = Extractor(model)
    ends = zip([inputs, *([b] for b in borders)], [*([b] for b in borders), outputs], strict=True)
    return [extractor.extract_model(*end).SerializeToString() for end in ends]


def _borders(model: onnx.ModelProto) -> list[str]:
    nodes = model.graph.node
    last_use = {name: i for i, node in enumerate(nodes) for name in node.input}
    last_use |= {value.name: len(nodes) for value in model.graph.output}
    live = {value.name for value in model.graph.input}
    by_node = {layer.node for layer in layers(model)}
    borders: list[str] = []
    has_layers = False
    for i, node in enumerate(nodes[:-1]):
        live = {name for name in (*live, *node.output) if last_use.get(name, 0) > i}
        has_layers |= node.name in by_node
        more = any(following.name in by_node for following in nodes[i + 1 :])
        if has_layers and more and len(live) == 1 and nodes[i + 1].op_type not in _FOLLOWING:
            borders += live
            has_layers = False
    return borders


class GraphSession:
    """A graph in ONNX Runtime on the CPU.

    Args:
        graph: ONNX.
        optimize: let ONNX Runtime put integer kernels in the place of Q/DQ, as a robot's CPU does.
            Those for signed values are slow, and with float16 scales they compute something else;
            without them, the graph is computed as it is written.
    """

    def __init__(self, graph: bytes, *, optimize: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # One core per run, and as many runs at a time as there are cores: see `run_all`.
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "0" if optimize else "1")
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, feed: Feed) -> list[Array]:
        """The outputs for inputs by name."""
        contiguous = {name: np.ascontiguousarray(value) for name, value in feed.items()}
        values: list[Array] = self._session.run(None, contiguous)
        return values

    def run_all(self, inputs: Iterable[Sequence[Array]]) -> list[list[Array]]:
        """The outputs for each of some inputs, which are in the graph's order."""
        feeds = [dict(zip(self._names, values, strict=True)) for values in inputs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.run, feeds))

    def run_first(self, inputs: Iterable[Sequence[Array]]) -> Array:
        """The first output for each of some inputs, joined along its first axis."""
        return np.concatenate([first for first, *_ in self.run_all(inputs)])
