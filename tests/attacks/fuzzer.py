"""Runs a bundle whose files an attacker has changed, digests included: a fork for every case.

python tests/attacks/fuzzer.py BUNDLE FILE COUNT SEED

Prints JSON: how many cases were refused by our error, how many acted, and every one that ended by
a signal, took more than ten seconds or raised anything else.
"""

import collections
import json
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable  # noqa: TC003
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vqbet_edge import EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.bundle import RUNTIME_NAME, Bundle, _check_graph

ACTED, REFUSED, OTHER = 0, 10, 11
SECONDS = 10
# As on a small board: what asks for more must fail, not swap.
MEMORY = 4 << 30
_NUMBERS = [0, 1, -1, 2, 7, 255, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63)]


def run(bundle: Bundle, name: str, data: bytes) -> None:
    """Load the bundle with one file replaced, and act twice."""
    if name != RUNTIME_NAME:
        _check_graph(name, data)
    changed = Bundle.of(bundle.path, bundle.manifest, {**bundle.contents, name: data})
    policy = EdgePolicy(changed, create_backend("onnxruntime", changed))
    features = bundle.manifest.input_features
    height, width, _ = bundle.manifest.frame_shape
    observation = {
        key: np.zeros((height, width, 3), np.uint8)
        if feature.type == "VISUAL"
        else np.ones(feature.shape, np.float32)
        for key, feature in features.items()
    }
    with np.errstate(all="ignore"):
        for _ in range(2):
            action = policy.act(observation)
            assert np.isfinite(action).all()


def outcome(bundle: Bundle, name: str, data: bytes) -> tuple[str, str]:
    """What a fork makes of it: (kind, details)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_child(bundle, name, data, writing))
    os.close(writing)
    with open(reading, "rb") as file:  # noqa: PTH123 - opened by descriptor
        details = file.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        return ("hang" if -code == signal.SIGALRM else signal.Signals(-code).name), details
    return {ACTED: "acted", REFUSED: "refused"}.get(code, "other"), details


def _child(bundle: Bundle, name: str, data: bytes, writing: int) -> int:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        run(bundle, name, data)
    except VQBeTEdgeError:
        return REFUSED
    except BaseException:  # noqa: BLE001 - is what we look for
        os.write(writing, traceback.format_exc().encode()[-4000:])
        return OTHER
    return ACTED


def mutated_bytes(data: bytes, random: np.random.Generator) -> bytes:
    """One to four changes, most of them near names, where a file's structure is."""
    text = bytearray(data)
    places = [match.start() for match in re.finditer(rb"[A-Za-z_.]{3,}", data)]
    for _ in range(random.integers(1, 5)):
        near = places[random.integers(len(places))] + int(random.integers(-12, 12))
        start = int(random.choice([near, random.integers(len(text))], p=[0.8, 0.2])) % len(text)
        length = int(random.choice([1, 1, 2, 8, 64, 4096]))
        match random.integers(5):
            case 0:
                text[start] ^= 1 << int(random.integers(8))
            case 1:
                text[start : start + length] = random.bytes(length)
            case 2:
                del text[start : start + length]
            case 3:
                text[start:start] = text[start : start + length]
            case _:
                text[start : start + 5] = b"\xff\xff\xff\xff\x7f"
        if len(text) < 16:
            break
    return bytes(text)


def mutated_graph(data: bytes, random: np.random.Generator) -> bytes:
    """One to three changes of a graph's nodes, attributes, shapes or names."""
    model = onnx.load_from_string(data)
    graph = model.graph
    for _ in range(random.integers(1, 4)):
        node = graph.node[random.integers(len(graph.node))]
        tensor = graph.initializer[random.integers(len(graph.initializer))]
        other = graph.node[random.integers(len(graph.node))]
        number = int(_NUMBERS[random.integers(len(_NUMBERS))])
        changes: list[Callable[[], Any]] = [
            lambda: setattr(node, "op_type", other.op_type),  # noqa: B023
            lambda: setattr(node, "domain", "com.microsoft"),  # noqa: B023
            lambda: node.input.append(other.output[0]),  # noqa: B023
            lambda: node.input.__setitem__(0, tensor.name),  # noqa: B023
            lambda: node.output.__setitem__(0, other.output[0]),  # noqa: B023
            lambda: graph.node.remove(node),  # noqa: B023
            lambda: node.attribute.extend(list(other.attribute)),  # noqa: B023
            lambda: [setattr(a, "i", number) for a in node.attribute],  # noqa: B023
            lambda: [a.ints.append(number) for a in node.attribute],  # noqa: B023
            lambda: tensor.dims.append(number),  # noqa: B023
            lambda: tensor.dims.__setitem__(0, number) if tensor.dims else None,  # noqa: B023
            lambda: setattr(tensor, "data_type", int(random.integers(0, 24))),  # noqa: B023
            lambda: setattr(tensor, "raw_data", tensor.raw_data[: random.integers(64)]),  # noqa: B023
            lambda: tensor.raw_data and setattr(tensor, "raw_data", random.bytes(len(tensor.raw_data))),  # noqa: B023
            lambda: setattr(graph.input[0].type.tensor_type.shape.dim[0], "dim_value", number),  # noqa: B023
            lambda: setattr(model.opset_import[0], "version", number % 100),  # noqa: B023
        ]  # fmt: skip
        if graph.node:
            changes[random.integers(len(changes))]()
    result: bytes = model.SerializeToString()
    return result


def main(path: str, name: str, count: int, seed: int) -> None:
    """Run `count` cases and print what became of them."""
    bundle, random = Bundle.open(Path(path)), np.random.default_rng(seed)
    data = bundle.contents[name]
    assert outcome(bundle, name, data)[0] == "acted", outcome(bundle, name, data)
    counts: collections.Counter[str] = collections.Counter()
    bad = []
    for case in range(count):
        structural = name.endswith(".onnx") and case % 2
        mutated = (mutated_graph if structural else mutated_bytes)(data, random)
        kind, details = outcome(bundle, name, mutated)
        counts[kind] += 1
        if kind not in ("acted", "refused"):
            bad.append({"case": case, "kind": kind, "details": details})
            if folder := os.environ.get("VQBET_EDGE_FUZZ_KEEP"):
                (Path(folder) / f"{seed}-{case}-{name}").write_bytes(mutated)
    print(json.dumps({"counts": counts, "bad": bad}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
