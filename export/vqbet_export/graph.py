"""From an inference module to one self-contained, checked ONNX file."""

import contextlib
import functools
from collections.abc import Collection, Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from vqbet_edge.errors import VerificationError
from vqbet_edge.runtime.signatures import Signature

# The newest that TensorRT 10.3 (JetPack 6.2) parses, and the first with Gelu.
OPSET = 20
IR_VERSION = 9

# What the graphs consist of. All of it is taken by TensorRT 10.3; an operator outside this
# set means that the export changed and wants a look.
ALLOWED_OPERATORS = frozenset(
    {
        "Add", "AveragePool", "Cast", "Concat", "Conv", "Div", "Gather", "Gelu", "Gemm", "Identity",
        "InstanceNormalization", "LayerNormalization", "MatMul", "MaxPool", "Mul", "Relu",
        "Reshape", "Resize", "Slice", "Softmax", "Split", "Sub", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
# What a graph with a free batch asks for its size with, once per run.
SIZE_OPERATORS = frozenset({"Shape"})


@functools.cache
def _read_operators_once() -> None:
    """Keep what PyTorch's exporter else reads from its operators' sources for every graph."""
    # None of its interface: in a PyTorch that has it elsewhere, an export is only slower.
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter._registration import (  # noqa: PLC0415
            ONNXRegistry,
        )

        cached = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        ONNXRegistry.from_torchlib = cached  # type: ignore[method-assign]


def export_graph(
    module: nn.Module, signature: Signature, free: Mapping[str, tuple[int, ...]] | None = None
) -> bytes:
    """Trace a module into ONNX.

    Args:
        module: the stage, its `forward` taking the inputs in order.
        signature: names, types and shapes of inputs and outputs.
        free: axes of inputs whose length is left open, up to the signature's.

    Returns:
        The serialised graph: constants folded, weights inside, no trace of the machine it was
        made on.

    Raises:
        VerificationError: the graph is not valid ONNX or has an operator outside the known set.
    """
    _read_operators_once()
    inputs = {t.name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in signature.inputs}
    program = torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=[tensor.name for tensor in signature.outputs],
        dynamic_shapes=_dynamic(inputs, free) if free else None,
        opset_version=OPSET,
        dynamo=True,
        optimize=True,
        verbose=False,
    )
    if program is None:
        raise VerificationError("torch.onnx.export returned no graph")
    model = program.model_proto
    model.ir_version = IR_VERSION
    _strip_comments(model)
    data: bytes = model.SerializeToString(deterministic=True)
    _check(model, data, ALLOWED_OPERATORS | SIZE_OPERATORS if free else ALLOWED_OPERATORS)
    return data


def _dynamic(
    inputs: Mapping[str, Tensor], free: Mapping[str, tuple[int, ...]]
) -> tuple[dict[int, Any], ...]:
    return tuple(dict.fromkeys(free.get(name, ()), torch.export.Dim.AUTO) for name in inputs)


def _strip_comments(message: Any) -> None:  # noqa: ANN401 - any protobuf message
    """Remove doc strings and metadata: they hold stack traces with the exporter's paths."""
    for field, value in message.ListFields():
        if field.name in {"doc_string", "metadata_props"}:
            message.ClearField(field.name)
        elif field.message_type is not None and field.name != "raw_data":
            for child in value if field.is_repeated else [value]:
                _strip_comments(child)


def _check(model: onnx.ModelProto, data: bytes, allowed: Collection[str]) -> None:
    try:
        # Of a model, the checker would make the bytes again.
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the exported graph is not valid ONNX: {error}") from error
    unknown = {node.op_type for node in model.graph.node}.difference(allowed)
    if unknown or model.functions or any(node.domain for node in model.graph.node):
        raise VerificationError(
            f"the exported graph has operators that no backend was tested with: {sorted(unknown)}; "
            "install the versions of torch and onnxscript in constraints.txt"
        )
