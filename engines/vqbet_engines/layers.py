"""What TensorRT made of a graph: final layers, the type of every tensor, what was fused."""

import json
import re
from typing import Any

from msgspec import Struct

# One layer of the builder's log is one line; its parts appear in this order.
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?, Outputs: \[(?P<outputs>.*?)\], "
    r"(?:TacticName|ParameterType|TacticValue|StreamId)",
    re.MULTILINE,
)
_TENSOR = re.compile(r"\{ Name: (?P<name>[^,]+),.*?Datatype: (?P<type>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# The log's names and the inspector's for one type.
_TYPES = {
    "Float": "FP32", "Half": "FP16", "BFloat16": "BF16", "Int8": "INT8", "UInt8": "UINT8",
    "Int32": "INT32", "Int64": "INT64", "Bool": "BOOL",
}  # fmt: skip
_TYPE_WORD = re.compile(r"\b(?:FP\d+|BF16|U?Int\d+|Float|Half|BFloat16|Bool)\b", re.IGNORECASE)
_CONVOLUTIONS = ("correlation", "convolution", "caskconvolution", "conv")


class Layer(Struct, frozen=True):
    """One layer of an engine.

    Attributes:
        name: TensorRT's.
        kind: what runs it: correlation (a convolution), gemm, kgen (generated kernel), ...
        inputs: type of every input, constants not among them.
        outputs: type of every output.
        nodes: names of the ONNX nodes that were fused into it.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def is_convolution(self) -> bool:
        """Whether it runs a convolution."""
        return self.kind.lower() in _CONVOLUTIONS

    @property
    def precision(self) -> str:
        """Types that it reads and writes, such as "FP16" or "FP32 -> FP16"."""
        reads, writes = ("+".join(sorted(set(types))) for types in (self.inputs, self.outputs))
        return writes if reads in (writes, "") else f"{reads} -> {writes}"


def parse_layers(text: str) -> tuple[Layer, ...]:
    """Layers from the engine inspector's JSON or from the builder's log; empty from neither."""
    if text.lstrip().startswith("{"):
        try:
            layers = json.loads(text).get("Layers", [])
        except ValueError:  # a list of layers is not worth a build
            return ()
        return tuple(_from_inspector(layer) for layer in layers)
    lines = {match.start(): match for match in _LINE.finditer(text)}
    return tuple(_from_log(match, text) for match in lines.values())


def _from_log(match: re.Match[str], text: str) -> Layer:
    line = text[match.start() : text.find("\n", match.start()) % (len(text) + 1)]
    return Layer(
        name=match["name"],
        kind=match["kind"],
        inputs=_types_of(match["inputs"]),
        outputs=_types_of(match["outputs"]),
        nodes=tuple(_NODE.findall(line)),
    )


def _types_of(tensors: str) -> tuple[str, ...]:
    return tuple(_TYPES.get(m["type"], m["type"].upper()) for m in _TENSOR.finditer(tensors))


def _from_inspector(layer: Any) -> Layer:  # noqa: ANN401
    if isinstance(layer, str):  # an engine built without details lists names only
        return Layer(layer, "unknown", (), (), ())
    return Layer(
        name=layer["Name"],
        kind=layer.get("LayerType", "unknown"),
        inputs=_types_from_inspector(layer.get("Inputs", [])),
        outputs=_types_from_inspector(layer.get("Outputs", [])),
        nodes=tuple(_NODE.findall(layer.get("Metadata", ""))),
    )


def _types_from_inspector(tensors: list[dict[str, Any]]) -> tuple[str, ...]:
    """Types that stand alone, "Float", or within a format, "Row major linear FP16 format"."""
    texts = (tensor.get("Datatype") or tensor.get("Format/Datatype", "") for tensor in tensors)
    found = (_TYPE_WORD.search(text) for text in texts)
    return tuple(_TYPES.get(m[0], m[0].upper()) if m else "UNKNOWN" for m in found)
