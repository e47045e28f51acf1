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
from torture import FULL, cases

from vqbet_edge import BundleError, EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime import bundle as reading
from vqbet_edge.runtime.bundle import Bundle

FUZZER = Path(__file__).with_name("fuzzer.py")
# Cases in every run, in `make test-all` and in `make torture`: 10,000 graphs, as many arrays.
FILES = {
    "gpt_cached.onnx": (2, 20, 4_000),
    "vision_encoder.onnx": (2, 10, 3_000),
    "code_heads.onnx": (4, 10, 3_000),
    "runtime.safetensors": (5, 50, 10_000),
}


@pytest.fixture
def copy(mini: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini, tmp_path / "a.bundle"))


@pytest.mark.parametrize("much", [False, pytest.param(True, marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", FILES)
def test_under_digests_that_fit_nothing_crashes_or_hangs(mini: Path, name: str, much: bool) -> None:
    few, more, all_of_them = FILES[name]
    count = cases(more, all_of_them) if much else few
    chunk = min(count, 1000)
    for seed in range(-(-count // chunk)):
        command = [sys.executable, FUZZER, mini, name, str(chunk), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["bad"] == []
        assert sum(found["counts"].values()) == chunk


@pytest.mark.parametrize("name", [*FILES, "report.md"])
def test_a_changed_file_is_refused_before_it_is_parsed(
    copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: Any) -> Any:
        raise AssertionError("an unchecked byte was parsed")

    monkeypatch.setattr(reading, "load_arrays", parse)
    monkeypatch.setattr(reading, "_check_graph", parse)
    original, random = (copy / name).read_bytes(), np.random.default_rng(3)
    for case in range(FILES[name][2] if FULL and name in FILES else 20):
        structural = name.endswith(".onnx") and case % 2
        changed = (mutated_graph if structural else mutated_bytes)(original, random)
        if changed == original:
            continue
        (copy / name).write_bytes(changed)
        with pytest.raises(BundleError, match=f"'{name}' is not the file that was exported"):
            Bundle.open(copy)


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


@pytest.mark.parametrize(
    "plant",
    [_more_memory_than_there_is, _an_operator_that_loads_an_engine, _a_function_that_calls_itself],
)
def test_graphs_that_ask_for_more_than_arithmetic(copy: Path, plant: Any) -> None:
    model = onnx.load_from_string((copy / "code_heads.onnx").read_bytes())
    plant(model)
    reseal(copy, {"code_heads.onnx": model.SerializeToString()})
    with (
        pytest.raises(VQBeTEdgeError, match=r"ONNX Runtime (refuses|failed in) code_heads"),
        EdgePolicy.load(copy, "onnxruntime") as policy,
    ):
        policy.act(miniature.observation(np.random.default_rng(0)))
