"""Graphs and arrays that somebody has changed, with and without the digests that belong to them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import onnx
import pytest
from attacks.fuzzer import mutated_bytes, mutated_graph
from attacks.manifests import reseal
from torture import cases

from vqbet_edge import BundleError, EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime import bundle as reading
from vqbet_edge.runtime.bundle import Bundle

FUZZER = Path(__file__).with_name("fuzzer.py")
# Cases in every run, cases with `make torture`: 10,000 graphs and 10,000 files of arrays.
FILES = {
    "gpt_cached.onnx": (20, 4_000),
    "vision_encoder.onnx": (10, 3_000),
    "code_heads.onnx": (10, 3_000),
    "runtime.safetensors": (50, 10_000),
}


@pytest.fixture
def copy(mini: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini, tmp_path / "a.bundle"))


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the manifest is parsed."""

    def parse(*_: Any) -> Any:
        raise AssertionError("an unchecked byte was parsed")

    monkeypatch.setattr(reading, "load_arrays", parse)
    monkeypatch.setattr(reading, "_check_graph", parse)


@pytest.mark.parametrize("name", FILES)
def test_under_digests_that_fit_nothing_crashes_or_hangs(mini: Path, name: str) -> None:
    chunk = cases(FILES[name][0], 1000)
    for seed in range(-(-cases(*FILES[name]) // chunk)):
        command = [sys.executable, FUZZER, mini, name, str(chunk), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["bad"] == []
        assert sum(found["counts"].values()) == chunk


@pytest.mark.usefixtures("no_parser")
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused_before_it_is_parsed(copy: Path, name: str) -> None:
    original, random = (copy / name).read_bytes(), np.random.default_rng(3)
    for case in range(cases(100, FILES[name][1])):
        structural = name.endswith(".onnx") and case % 2
        changed = (mutated_graph if structural else mutated_bytes)(original, random)
        if changed == original:
            continue
        (copy / name).write_bytes(changed)
        with pytest.raises(BundleError, match=f"'{name}' is not the file that was exported"):
            Bundle.open(copy)


@pytest.mark.usefixtures("no_parser")
def test_a_flipped_byte_anywhere_is_found_and_the_file_named(copy: Path) -> None:
    names, random = sorted(os.listdir(copy)), np.random.default_rng(4)
    for _ in range(cases(150, 1000)):
        name = names[random.integers(len(names))]
        original = (copy / name).read_bytes()
        flipped = bytearray(original)
        flipped[random.integers(len(flipped))] ^= int(random.integers(1, 256))
        (copy / name).write_bytes(flipped)
        with pytest.raises(BundleError) as refused:
            Bundle.open(copy)
        # A digest or a name that was flipped in the manifest fits no file any more.
        named = {name, *(set(names) if name == "manifest.json" else ())}
        assert any(each in str(refused.value) for each in named), refused.value
        (copy / name).write_bytes(original)


def _more_memory_than_there_is(model: onnx.ModelProto) -> None:
    size = onnx.numpy_helper.from_array(np.array([1 << 40], np.int64), "size")
    model.graph.initializer.append(size)
    zeros = onnx.helper.make_node("ConstantOfShape", ["size"], ["zeros"])
    model.graph.node.extend([zeros, onnx.helper.make_node("ReduceSum", ["zeros"], ["sum"])])
    _behind_the_first_output(model, "Add", "", "sum")


def _an_operator_that_loads_an_engine(model: onnx.ModelProto) -> None:
    names = {"embed_mode": 0, "ep_cache_context": "../secret.bin", "main_context": 1}
    _behind_the_first_output(model, "EPContext", "com.microsoft", **names)


def _a_function_that_calls_itself(model: onnx.ModelProto) -> None:
    opset = onnx.helper.make_opsetid("ours", 1)
    call = onnx.helper.make_node("F", ["x"], ["y"], domain="ours")
    model.functions.append(onnx.helper.make_function("ours", "F", ["x"], ["y"], [call], [opset]))
    _behind_the_first_output(model, "F", "ours")


def _behind_the_first_output(
    model: onnx.ModelProto, operator: str, domain: str, *more: str, **attributes: Any
) -> None:
    (name, *_), inside = [output.name for output in model.graph.output], "inside"
    for node in model.graph.node:
        node.output[:] = [inside if output == name else output for output in node.output]
    node = onnx.helper.make_node(operator, [inside, *more], [name], domain=domain, **attributes)
    model.graph.node.append(node)
    if domain:
        model.opset_import.add(domain=domain, version=1)


def _acted(bundle: Path) -> None:
    with EdgePolicy.load(bundle, "onnxruntime") as policy:
        policy.act(miniature.observation(np.random.default_rng(0)))


@pytest.mark.parametrize(
    "plant",
    [_more_memory_than_there_is, _an_operator_that_loads_an_engine, _a_function_that_calls_itself,
     lambda model: _behind_the_first_output(model, "Run", "theirs")],
)  # fmt: skip
def test_graphs_that_ask_for_more_than_arithmetic(copy: Path, plant: Any) -> None:
    model = onnx.load_from_string((copy / "code_heads.onnx").read_bytes())
    plant(model)
    reseal(copy, {"code_heads.onnx": model.SerializeToString()})
    with pytest.raises(VQBeTEdgeError, match=r"ONNX Runtime (refuses|failed in) code_heads"):
        _acted(copy)
