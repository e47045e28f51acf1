from typing import Any

import onnx
import pytest
from sizes import SMALL
from vqbet_engines.boards import board_names, load_board
from vqbet_engines.suitability import check_graphs

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def graphs(make_bundle: Any) -> dict[str, bytes]:
    bundle = make_bundle("fp16", **SMALL)
    return {stage: bundle.graph(stage) for stage in bundle.manifest.stages}


def test_the_exporters_graphs_suit_jetpack_6(graphs: Any) -> None:
    found = check_graphs(graphs, load_board("orin-nano"))
    assert found.problems == ()
    assert "sm86" in found.notes[-1]


def test_every_board_has_a_check(graphs: Any) -> None:
    heads = {"code_heads": graphs["code_heads"]}
    for name in board_names():
        assert check_graphs(heads, load_board(name)).problems == ()


def test_an_opset_that_no_jetpack_takes(graphs: Any) -> None:
    model = onnx.load_from_string(graphs["code_heads"])
    model.opset_import[0].version = 25
    problems = check_graphs({"code_heads": model.SerializeToString()}, load_board("t4000")).problems
    assert problems[0].startswith("code_heads: opset 25 is newer")


def test_a_graph_that_tensorrt_refuses(graphs: Any) -> None:
    model = onnx.load_from_string(graphs["code_heads"])
    next(node for node in model.graph.node if node.op_type == "Gemm").op_type = "Acos2"
    data = {"code_heads": model.SerializeToString()}
    (problem,) = check_graphs(data, load_board("orin-nx")).problems
    assert "Acos2" in problem
