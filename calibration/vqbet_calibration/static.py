"""Q/DQ with ranges from calibration, by ONNX Runtime's quantiser: what each target's kernels want.

TensorRT wants signed symmetric values with zero point 0, weights stored as int8 with a scale per
output channel, floating-point biases, and pairs on inputs only: a pair between a convolution and
the residual addition that it fuses with blocks the fusion, so the addition's other operand gets
one instead. Everything between pairs keeps the graph's own type, float32 or float16.

ONNX Runtime's own kernels want unsigned activations, outputs quantised as well, and biases as
int32; additions and poolings between quantised tensors are quantised too.

Ours is only what the quantiser lacks: which nodes belong to a layer, the one-sided pair on residual
additions, and ranges of one graph for its float16 twin.
"""

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from vqbet_calibration.graphs import Feed, Layer, Quantizer, layers
from vqbet_edge.runtime.manifest import Target

_LAYER_TYPES = ["Conv", "Gemm", "MatMul"]
# What is quantised between quantised layers, on CPUs.
_BETWEEN_TYPES = ["Add", "MaxPool", "Relu"]
_OPTIONS: dict[Target, dict[str, Any]] = {
    "tensorrt": {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": [*_LAYER_TYPES, "Add"],
    },
    "cpu": {"WeightSymmetric": True},
}

# Tensor -> its smallest and largest value.
Ranges = Mapping[str, tuple[float, float]]


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def collect_ranges(graph: bytes, feeds: Iterable[Feed]) -> Ranges:
    """What values the tensors take that either target may quantise.

    Args:
        graph: floating-point ONNX.
        feeds: inputs by name, one entry per run; they are drawn one by one.
    """
    model = onnx.load_from_string(graph)
    nodes = {layer.node for layer in layers(model)}
    types = {node.op_type for node in model.graph.node if node.name in nodes}
    if "Conv" in types:
        types |= set(_BETWEEN_TYPES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(graph)
        augmented = str(Path(folder) / "augmented.onnx")
        calibrator = create_calibrator(path, sorted(types), augmented, CalibrationMethod.MinMax)
        calibrator.collect_data(_Feeds(feeds))
        found = calibrator.compute_data()
    extents = {name: np.ravel(values.range_value).tolist() for name, values in found.items()}
    return {name: (low, high) for name, (low, high) in extents.items()}


@dataclass(frozen=True)
class Static(Quantizer):
    """One stage, quantised by Q/DQ with fixed ranges.

    Attributes:
        target: whose placement.
        ranges: of the graph's tensors.
    """

    target: Target
    ranges: Ranges
    methods: ClassVar = ("min-max",)

    @property
    def layers(self) -> tuple[str, ...]:
        """See `Quantizer`."""
        found = layers(onnx.load_from_string(self.graph))
        # Unsigned kernels quantise their output too, and a softmax's logits need more than 8 bits.
        return tuple(x.name for x in found if self.target == "tensorrt" or not x.before_softmax)

    def of_twin(self, graph: bytes) -> "Static":
        """See `Quantizer`."""
        names = _corresponding(onnx.load_from_string(self.graph), onnx.load_from_string(graph))
        ranges = {names[name]: extent for name, extent in self.ranges.items() if name in names}
        return replace(self, graph=graph, ranges=ranges)

    def _quantized(
        self, model: onnx.ModelProto, found: Sequence[Layer], _chosen: Mapping[str, str]
    ) -> onnx.ModelProto:
        if self.target == "cpu":
            return self._with_pairs(model, _with_between(model, found), QuantType.QUInt8)
        residuals = _residuals(model, found)
        nodes = {layer.node for layer in found} | residuals.keys()
        quantized = self._with_pairs(model, nodes, QuantType.QInt8)
        _free_fused_operands(quantized, residuals)
        return quantized

    def _with_pairs(
        self, model: onnx.ModelProto, nodes: Collection[str], activations: QuantType
    ) -> onnx.ModelProto:
        weights = {w.name: w.data_type for w in model.graph.initializer}
        of_layers = {layer.node for layer in layers(model)}
        kind = next(weights[n.input[1]] for n in model.graph.node if n.name in of_layers)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        extents = {
            name: TensorData(lowest=np.array(low, dtype), highest=np.array(high, dtype))
            for name, (low, high) in self.ranges.items()
        }
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            # Kernels of x86 without VNNI add two products of uint8 and int8 in 16 bits: weights of
            # 7 bits do not overflow there, and the bundle computes the same on every CPU.
            reduce_range=self.target == "cpu",
            weight_qType=QuantType.QInt8,
            activation_qType=activations,
            tensors_range=TensorsData(CalibrationMethod.MinMax, extents),
            nodes_to_quantize=sorted(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=[*_LAYER_TYPES, *_BETWEEN_TYPES],
            extra_options=_OPTIONS[self.target],
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantized: onnx.ModelProto = quantizer.model.model
        onnx.checker.check_model(quantized)
        return quantized


def _corresponding(model: onnx.ModelProto, twin: onnx.ModelProto) -> dict[str, str]:
    """Tensors at the layers, additions and poolings of a graph -> the same ones in its twin.

    The twin has casts more, and the names of tensors differ behind them.
    """
    names: dict[str, str] = {}
    for kind in (*_LAYER_TYPES, *_BETWEEN_TYPES):
        ours, theirs = ([n for n in m.graph.node if n.op_type == kind] for m in (model, twin))
        for node, other in zip(ours, theirs, strict=True):
            names |= zip((*node.input, *node.output), (*other.input, *other.output), strict=True)
    return names


def _residuals(model: onnx.ModelProto, found: Collection[Layer]) -> dict[str, str]:
    """Residual addition -> its operand that comes from a chosen convolution, and fuses with it."""
    chosen = {layer.node for layer in found}
    makers = {n.output[0]: n for n in model.graph.node if n.op_type == "Conv" and n.name in chosen}
    constants = {w.name for w in model.graph.initializer}
    residuals = {}
    for node in model.graph.node:
        fused = [name for name in node.input if name in makers]
        if node.op_type == "Add" and fused and not constants & {*node.input}:
            residuals[node.name] = fused[0]
    return residuals


def _free_fused_operands(model: onnx.ModelProto, residuals: Mapping[str, str]) -> None:
    """Take the pair between a convolution and its addition away again."""
    makers = {name: node for node in model.graph.node for name in node.output}
    freed = set(residuals.values())
    unused = set()
    for node in model.graph.node:
        if node.name not in residuals:
            continue
        for i, name in enumerate(node.input):
            dequantize = makers[name]
            quantize = makers[dequantize.input[0]]
            if quantize.input[0] in freed:
                node.input[i] = quantize.input[0]
                unused |= {dequantize.name, quantize.name}
    kept = [node for node in model.graph.node if node.name not in unused]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    ONNXModel(model).clean_initializers()


def _with_between(model: onnx.ModelProto, found: Collection[Layer]) -> set[str]:
    """The layers' nodes, and those that read nothing but what such nodes make."""
    nodes = {layer.node for layer in found}
    made: set[str] = set()
    for node in model.graph.node:
        if node.op_type in _BETWEEN_TYPES and {*node.input} <= made:
            nodes.add(node.name)
        if node.name in nodes:
            made |= {*node.output}
    return nodes
