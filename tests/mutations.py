"""Simple ways in which a bundle computes another policy, each under digests that fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName

RUN: tuple[StageName, ...] = ("vision_encoder", "gpt", "code_heads")
Mutations = Iterator[tuple[str, Bundle]]

_VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "times 1.05": lambda x: x * 1.05,
    "doubled": lambda x: x * 2,
    "negated": lambda x: -x,
    "shifted": lambda x: x + 0.2 * (x.std() or abs(x).max() or 1),
    "transposed": lambda x: np.swapaxes(x, 0, 1).reshape(x.shape) if x.ndim > 1 else x,
}


def mutations(bundle: Bundle, other: Bundle) -> Mutations:
    """Name and bundle, one after the other.

    Args:
        bundle: for CPUs, with a table.
        other: of the same sizes and precision, made from another checkpoint.
    """
    yield from _arrays(bundle)
    yield from _weights(bundle)
    yield from _tensors(bundle)
    yield from _facts(bundle)
    for stage in RUN:
        yield f"{stage} of another checkpoint", with_graph(bundle, stage, other.cpu_graph(stage))
    yield "arrays of another checkpoint", replace(bundle, arrays=other.arrays)


def with_graph(bundle: Bundle, stage: StageName, graph: bytes) -> Bundle:
    file = bundle.manifest.graphs("cpu")[stage].file
    return replace(bundle, contents={**bundle.contents, file: graph})


def _arrays(bundle: Bundle) -> Mutations:
    for name, values in bundle.arrays.items():
        changes = dict(_VALUES)
        for axis in range(values.ndim):
            changes[f"rolled along axis {axis}"] = lambda x, axis=axis: np.roll(x, 1, axis)
        for how, change in changes.items():
            changed = change(values).astype(np.float32)
            if not np.array_equal(changed, values):
                yield f"{name} {how}", replace(bundle, arrays={**bundle.arrays, name: changed})


def _weights(bundle: Bundle) -> Mutations:
    for stage, factor in product(RUN, (1.05, 2, -1)):
        model = onnx.load_from_string(bundle.cpu_graph(stage))
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype.kind == "f" and values.size > 1:
                changed = (values * factor).astype(values.dtype)
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        graph = model.SerializeToString()
        yield f"{stage}: weights times {factor}", with_graph(bundle, stage, graph)


# Stage, input or output, what is done to it.
_TENSORS: list[tuple[StageName, str, str, Any]] = [
    *(("vision_encoder", "frames", "reversed", axis) for axis in (1, 2, 3, 4)),
    *(("vision_encoder", "frame_tokens", "reversed", axis) for axis in (1, 2)),
    *(("gpt", name, "reversed", 1) for name in ("image_tokens", "states", "feature")),
    ("gpt", "image_tokens", "reversed", 2),
    ("gpt", "states", "reversed", 2),
    *(("code_heads", "logits", "reversed", axis) for axis in (1, 2)),
    *(("code_heads", "offsets", "reversed", axis) for axis in (1, 2, 3, 4)),
    *(("code_heads", "offsets", "exchanged", pair) for pair in ((0, 7), (5, 6))),
    *(("code_heads", "logits", "times", x) for x in (1.05, 3, 10, -100)),
    *(("code_heads", "offsets", "times", x) for x in (0, 1.05, 5)),
    *(("gpt", "feature", "times", x) for x in (1.05, 1.3)),
    *(("vision_encoder", "frame_tokens", "times", x) for x in (1.05, 1.3)),
]


def _tensors(bundle: Bundle) -> Mutations:
    for stage, tensor, how, what in _TENSORS:
        model = onnx.load_from_string(bundle.cpu_graph(stage))
        values = [*model.graph.input, *model.graph.output]
        place = next(value for value in values if value.name == tensor)
        sizes = [axis.dim_value for axis in place.type.tensor_type.shape.dim]
        elements = place.type.tensor_type.elem_type
        if how == "times":
            factor = np.asarray(what, helper.tensor_dtype_to_np_dtype(elements))
            constant, node = numpy_helper.from_array(factor, "mutation"), ("Mul", {})
        else:
            axis = what if how == "reversed" else 2
            # A window's length is free in the transformer's graph.
            length = sizes[axis] or bundle.manifest.policy.n_obs_steps
            order = np.arange(length)[::-1] if how == "reversed" else _exchanged(length, what)
            if np.array_equal(order, np.arange(length)):
                continue
            constant, node = numpy_helper.from_array(order, "mutation"), ("Gather", {"axis": axis})
        _insert(model, tensor, is_input=place in model.graph.input, constant=constant, node=node)
        graph = model.SerializeToString()
        yield f"{stage}: {tensor} {how} {what}", with_graph(bundle, stage, graph)


def _exchanged(length: int, pair: tuple[int, int]) -> np.ndarray:
    order = np.arange(length)
    order[list(pair)] = order[list(pair)[::-1]]
    return order


def _insert(model: Any, tensor: str, *, is_input: bool, constant: Any, node: Any) -> None:
    """Put a node behind an input, or before an output."""
    graph, (operator, attributes) = model.graph, node
    inner = f"{tensor}_unchanged"
    for each in graph.node:
        names = each.input if is_input else each.output
        for place, name in enumerate(names):
            if name == tensor:
                names[place] = inner
    ends = ([tensor, "mutation"], [inner]) if is_input else ([inner, "mutation"], [tensor])
    made = helper.make_node(operator, *ends, name="mutation", **attributes)
    graph.initializer.append(constant)
    graph.node.insert(0 if is_input else len(graph.node), made)


def _facts(bundle: Bundle) -> Mutations:
    """What the manifest says."""
    manifest = bundle.manifest

    def policy(**changes: Any) -> Bundle:
        changed = msgspec.structs.replace(manifest.policy, **changes)
        return replace(bundle, manifest=msgspec.structs.replace(manifest, policy=changed))

    for side in ("top", "left"):
        crop = msgspec.structs.replace(manifest.crop, **{side: getattr(manifest.crop, side) + 1})
        yield (
            f"crop's {side}",
            replace(bundle, manifest=msgspec.structs.replace(manifest, crop=crop)),
        )
    temperature = manifest.policy.bet_softmax_temperature
    for factor in (0.2, 0.99, 5):
        yield f"temperature times {factor}", policy(bet_softmax_temperature=temperature * factor)
    yield "actions relative to the state", policy(relative_actions=(True, True))
    yield "first action relative", policy(relative_actions=(True, False))
    for key in ("state", "action"):
        mean = {"subtract": 0.0, "multiply": 1.0, "add": 0.0}
        arrays = {f"{key}.{term}": np.full(2, x, np.float32) for term, x in mean.items()}
        yield f"{key} is not normalised", replace(bundle, arrays={**bundle.arrays, **arrays})
