"""Where quantisation goes: Q/DQ pairs as TensorRT, and as CPU kernels, want them.

TensorRT wants signed symmetric values with zero point 0, weights stored as int8 with a scale per
output channel, floating-point biases, and pairs on inputs only: a pair between a convolution and
the residual addition that it fuses with blocks the fusion, so the addition's other operand gets
one instead. Everything between pairs keeps the graph's own type, float32 or float16.

ONNX Runtime's integer kernels want unsigned activations, outputs quantised as well, and biases as
int32; additions and poolings between quantised tensors are quantised too. A transformer's matrix
products are faster on them, and more exact, with ranges taken anew at every run.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from vqbet_calibration.graphs import Array, Layer, consumers, initializer_array, layers
from vqbet_calibration.ranges import Range

RESIDUAL = "#residual"
# Smallest scale whose float16 has full precision.
_SMALLEST_SCALE = 2.0**-14
# Kernels of x86 without VNNI add two products of uint8 and int8 in 16 bits: weights of 7 bits do
# not overflow there, and the bundle computes the same on every CPU.
_CPU_WEIGHT_LEVELS = 63
_SIGNED_LEVELS = 127


def signed_sites(model: onnx.ModelProto) -> dict[str, str]:
    """Site -> tensor whose range it needs: every layer's input, every residual operand.

    Sites are named after layers, so those of a float32 graph serve its float16 twin.
    """
    nodes = {node.name: node for node in model.graph.node}
    found = layers(model)
    sites = {layer.name: nodes[layer.node].input[0] for layer in found}
    residuals = _residuals(model, found)
    return sites | {f"{name}{RESIDUAL}": node.input[i] for name, (node, i) in residuals.items()}


def _residuals(
    model: onnx.ModelProto, found: Collection[Layer]
) -> dict[str, tuple[onnx.NodeProto, int]]:
    """Convolution -> the addition that it fuses with, and which operand is the residual one."""
    readers = consumers(model)
    convolutions = {n.output[0]: n for n in model.graph.node if n.op_type == "Conv"}
    constants = {w.name for w in model.graph.initializer}
    by_node = {layer.node: layer.name for layer in found}
    residuals = {}
    for node in model.graph.node:
        if node.op_type != "Add" or constants & set(node.input):
            continue
        for i, name in enumerate(node.input):
            source = convolutions.get(name)
            if source is not None and source.name in by_node and len(readers[name]) == 1:
                residuals[by_node[source.name]] = node, 1 - i
                break
    return residuals


@dataclass
class _Editor:
    """A graph that is rewritten node by node, in order."""

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    pairs: dict[str, str] = field(default_factory=dict)
    dtype: np.dtype[np.float16] | np.dtype[np.float32] = field(default=np.dtype(np.float32))

    def constant(self, name: str, value: Array) -> str:
        if not any(w.name == name for w in self.model.graph.initializer):
            self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def emit(self, kind: str, inputs: list[str], outputs: list[str], **attributes: int) -> None:
        name = f"{kind}.{outputs[0]}"
        node = helper.make_node(kind, inputs, outputs, name, **attributes)  # type: ignore[arg-type]
        self.nodes.append(node)

    def pair(self, tensor: str, scale: float, zero_point: Array) -> str:
        """Q and DQ behind a tensor, once; the name of the result."""
        if tensor not in self.pairs:
            parameters = [
                self.constant(f"{tensor}.scale", np.array(scale, self.dtype)),
                self.constant(f"{tensor}.zero_point", zero_point),
            ]
            names = [f"{tensor}.quantized", f"{tensor}.dequantized"]
            self.emit("QuantizeLinear", [tensor, *parameters], names[:1])
            self.emit("DequantizeLinear", [names[0], *parameters], names[1:])
            self.pairs[tensor] = names[1]
        return self.pairs[tensor]

    def dequantized(self, name: str, values: Array, scale: Array, *, axis: int) -> str:
        """A constant of integers with a scale per index of an axis; the name of its values."""
        inputs = [
            self.constant(f"{name}.quantized", values),
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", np.zeros(scale.shape, values.dtype)),
        ]
        output = f"{name}.dequantized"
        if output not in self.pairs:
            self.emit("DequantizeLinear", inputs, [output], axis=axis)
            self.pairs[output] = output
        return output

    def finish(self) -> bytes:
        """The serialised graph, without constants that nothing reads any more."""
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        used = {name for node in graph.node for name in node.input}
        kept = [w for w in graph.initializer if w.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        del graph.value_info[:]
        onnx.checker.check_model(self.model)
        data: bytes = self.model.SerializeToString(deterministic=True)
        return data


def _weight_scale(weight: Array, axis: int, levels: int, dtype: np.dtype[np.floating]) -> Array:
    """Per output channel; a channel of zeros has scale 1."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight.astype(np.float64)).max(axis=others)
    scale = np.where(largest == 0, 1.0, largest / levels).astype(dtype)
    # Float16 rounds tiny scales to 0.
    return np.maximum(scale, np.finfo(dtype).smallest_subnormal)


def _quantized_weight(
    editor: _Editor, layer: Layer, levels: int
) -> tuple[str, NDArray[np.float64]]:
    """Name of the dequantised weights, and their scales."""
    weight = initializer_array(editor.model, layer.weight)
    scale = _weight_scale(weight, layer.axis, levels, editor.dtype)
    shape = [-1 if i == layer.axis else 1 for i in range(weight.ndim)]
    ratio = weight.astype(np.float64) / scale.astype(np.float64).reshape(shape)
    values = np.clip(np.rint(ratio), -levels, levels).astype(np.int8)
    name = editor.dequantized(layer.weight, values, scale, axis=layer.axis)
    return name, scale.astype(np.float64)


def quantize_signed(graph: bytes, names: Collection[str], ranges: Mapping[str, Range]) -> bytes:
    """Q/DQ as TensorRT takes it.

    Args:
        graph: float32 or float16 ONNX.
        names: the layers to quantise, as `graphs.layers` names them.
        ranges: by site, see `signed_sites`.
    """
    model = onnx.load_from_string(graph)
    found = layers(model)
    chosen = {layer.node: layer for layer in found if layer.name in names}
    residuals = {
        node.name: (f"{name}{RESIDUAL}", i)
        for name, (node, i) in _residuals(model, found).items()
        if name in names
    }
    types = {w.name: numpy_helper.to_array(w).dtype for w in model.graph.initializer}
    editor = _Editor(model)
    for node in list(model.graph.node):
        if node.name in chosen:
            layer = chosen[node.name]
            editor.dtype = types[layer.weight]
            scale = _signed_scale(ranges[layer.name])
            node.input[0] = editor.pair(node.input[0], scale, np.array(0, np.int8))
            node.input[1], _ = _quantized_weight(editor, layer, _SIGNED_LEVELS)
        elif node.name in residuals:
            site, i = residuals[node.name]
            scale = _signed_scale(ranges[site])
            node.input[i] = editor.pair(node.input[i], scale, np.array(0, np.int8))
        editor.nodes.append(node)
    return editor.finish()


def _signed_scale(extent: Range) -> float:
    return max(extent.magnitude / _SIGNED_LEVELS, _SMALLEST_SCALE)


def unsigned_sites(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor -> itself, for every tensor that may need a range."""
    constants = {w.name for w in model.graph.initializer}
    kinds = {layer.node for layer in layers(model)}
    inner = {"Add", "MaxPool", "Relu"}
    tensors = {
        name
        for node in model.graph.node
        if node.name in kinds or node.op_type in inner
        for name in (node.input[0], *node.output)
    }
    return {name: name for name in sorted(tensors - constants)}


def quantize_unsigned(graph: bytes, names: Collection[str], ranges: Mapping[str, Range]) -> bytes:
    """Q/DQ as ONNX Runtime's and OpenVINO's CPU kernels want it.

    Args:
        graph: float32 ONNX.
        names: the layers to quantise, as `graphs.layers` names them.
        ranges: by tensor, see `unsigned_sites`.
    """
    model = onnx.load_from_string(graph)
    chosen = {layer.node: layer for layer in layers(model) if layer.name in names}
    pass_ = _UnsignedPass(_Editor(model), ranges, consumers(model))
    for node in list(model.graph.node):
        pass_.add(node, chosen.get(node.name))
    return pass_.editor.finish()


@dataclass
class _UnsignedPass:
    """Every tensor behind a quantised layer is quantised, as far as the kernels reach."""

    editor: _Editor
    ranges: Mapping[str, Range]
    readers: Mapping[str, list[onnx.NodeProto]]
    renamed: dict[str, str] = field(default_factory=dict)  # tensor -> its quantised self
    dropped: set[str] = field(default_factory=set)

    def add(self, node: onnx.NodeProto, layer: Layer | None) -> None:
        if node.name in self.dropped:
            return
        sources = list(node.input)
        if layer is not None and sources[0] not in self.renamed:
            self._quantize(sources[0], sources[0])
        node.input[:] = [self.renamed.get(name, name) for name in sources]
        if layer is not None:
            self._quantize_constants(node, layer, sources)
        self.editor.nodes.append(node)
        if layer is not None or (node.op_type == "Add" and set(sources) <= self.renamed.keys()):
            self._absorb_relu(node)
            self._quantize(node.output[0], node.output[0])
        elif node.op_type == "MaxPool" and sources[0] in self.renamed:
            self._quantize(node.output[0], sources[0])

    def _quantize(self, tensor: str, like: str) -> None:
        parameters = _unsigned_parameters(self.ranges[like])
        self.renamed[tensor] = self.editor.pair(tensor, *parameters)

    def _quantize_constants(self, node: onnx.NodeProto, layer: Layer, sources: list[str]) -> None:
        node.input[1], scale = _quantized_weight(self.editor, layer, _CPU_WEIGHT_LEVELS)
        if len(sources) > 2:
            step = scale * _unsigned_parameters(self.ranges[sources[0]])[0]
            node.input[2] = _quantized_bias(self.editor, sources[2], layer.name, step)

    def _absorb_relu(self, node: onnx.NodeProto) -> None:
        """Quantising from 0 on does what the Relu does."""
        following = self.readers.get(node.output[0], [])
        if [n.op_type for n in following] == ["Relu"]:
            self.dropped.add(following[0].name)
            node.output[0] = following[0].output[0]


def _unsigned_parameters(extent: Range) -> tuple[float, Array]:
    scale = max((extent.high - extent.low) / 255, _SMALLEST_SCALE)
    return scale, np.array(np.clip(round(-extent.low / scale), 0, 255), np.uint8)


def _quantized_bias(editor: _Editor, bias: str, layer: str, step: NDArray[np.float64]) -> str:
    limits = np.iinfo(np.int32)
    ratio = initializer_array(editor.model, bias).astype(np.float64) / step
    values = np.clip(np.rint(ratio), limits.min, limits.max).astype(np.int32)
    return editor.dequantized(f"{layer}.bias", values, step.astype(np.float32), axis=0)


def quantize_dynamic(graph: bytes, names: Collection[str]) -> bytes:
    """Integer matrix products whose input's range is taken at every run; no calibration.

    The nodes are those that ONNX Runtime fuses into one kernel: DynamicQuantizeLinear (once per
    tensor), MatMulInteger, Cast, Mul, Add.

    Args:
        graph: float32 ONNX with Gemm and MatMul layers.
        names: the layers to quantise, as `graphs.layers` names them.
    """
    model = onnx.load_from_string(graph)
    chosen = {layer.node: layer for layer in layers(model) if layer.name in names}
    editor = _Editor(model)
    for node in list(model.graph.node):
        if node.name in chosen:
            _integer_product(editor, node, chosen[node.name])
        else:
            editor.nodes.append(node)
    return editor.finish()


def _integer_product(editor: _Editor, node: onnx.NodeProto, layer: Layer) -> None:
    source, output, name = node.input[0], node.output[0], layer.name
    parts = [f"{source}.{part}" for part in ("quantized", "scale", "zero_point")]
    if source not in editor.pairs:
        editor.emit("DynamicQuantizeLinear", [source], parts)
        editor.pairs[source] = parts[0]
    weight = initializer_array(editor.model, layer.weight)
    columns = weight.T if layer.axis == 0 else weight  # (inputs, outputs)
    scale = _weight_scale(columns, 1, _CPU_WEIGHT_LEVELS, editor.dtype)
    integers = [
        editor.constant(f"{name}.quantized", np.rint(columns / scale).astype(np.int8)),
        editor.constant(f"{name}.zero_point", np.zeros(scale.shape, np.int8)),
    ]
    editor.emit("MatMulInteger", [parts[0], integers[0], parts[2], integers[1]], [f"{name}.sum"])
    editor.emit("Cast", [f"{name}.sum"], [f"{name}.float"], to=onnx.TensorProto.FLOAT)
    scales = [parts[1], editor.constant(f"{name}.scale", scale)]
    editor.emit("Mul", scales, [f"{name}.step"])
    product = f"{name}.product" if len(node.input) > 2 else output
    editor.emit("Mul", [f"{name}.float", f"{name}.step"], [product])
    if len(node.input) > 2:
        editor.emit("Add", [product, node.input[2]], [output])
