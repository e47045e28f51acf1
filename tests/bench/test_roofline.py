"""Counts of weights and multiply-adds, against PyTorch's own counter."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode
from vqbet_bench.ceilings import board_ceilings, measure_bandwidth, measure_gemm
from vqbet_bench.results import Ceilings, Memory, Result
from vqbet_bench.roofline import (
    Cost,
    graph_cost,
    stage_bound,
    stage_bounds,
    stage_runs,
    total_weights,
)
from vqbet_engines.boards import board_names, load_board
from vqbet_export.stages import CodeHeadsStage, GptStage, RvqDecoderStage, VisionEncoderStage
from workshop import Exported

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.training.checkpoint import load_checkpoint

STAGES = {
    "vision_encoder": VisionEncoderStage,
    "gpt": GptStage,
    "code_heads": CodeHeadsStage,
    "rvq_decoder": RvqDecoderStage,
}


@pytest.mark.parametrize("stage", STAGES)
def test_multiply_adds_are_half_of_what_pytorch_counts(tiny: Exported, stage: Any) -> None:
    bundle = Bundle.open(tiny.bundle)
    module = STAGES[stage](load_checkpoint(str(tiny.checkpoint)), torch.float32).eval()
    inputs = [
        torch.zeros(t.shape, dtype=getattr(torch, t.dtype))
        for t in bundle.manifest.stages[stage].inputs
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    assert graph_cost(bundle.graph(stage)).multiply_adds == counter.get_total_flops() // 2


def test_grouped_and_strided_convolutions_count_their_own_inputs_only() -> None:
    module = torch.nn.Conv2d(8, 16, 3, stride=2, groups=4, bias=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 8, 20, 30))
    weight = numpy_helper.from_array(module.weight.detach().numpy(), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], group=4)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8, 20, 30))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 16, 9, 14))],
        [weight],
    )
    cost = graph_cost(helper.make_model(graph).SerializeToString())
    assert cost == Cost(module.weight.numel() * 4, counter.get_total_flops() // 2)


def shown(backend: str, stages: dict[str, list[float]]) -> Result:
    """A result as it comes from measuring the bundle."""
    memory = Memory(resident=0, peak=0, observations=0)
    details = {"backend": backend}
    return Result("tiny", "edge", 5, details, 0.0, 0.0, {}, memory, stages)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_weights_are_the_graphs_initializers(tiny: Exported, backend: str) -> None:
    bundle = Bundle.open(tiny.bundle)
    runs = stage_runs(bundle, shown(backend, {"gpt": [0.5]}))
    assert set(runs) == set(bundle.stages_to_load)
    by_file = {run.file: run.cost.weight_bytes for run in runs.values()}
    for file, weight_bytes in by_file.items():
        graph = onnx.load_from_string(bundle.contents[file]).graph
        arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
        assert weight_bytes == sum(array.nbytes for array in arrays)
    assert total_weights(runs) == sum(by_file.values())
    bounds = stage_bounds(runs, Ceilings("made up", 1e9, {"fp32": 1e12}), {"gpt": 0.5})
    assert bounds["gpt"].ratio == pytest.approx(0.5 / bounds["gpt"].bound)
    assert bounds["code_heads"].ratio is None


def test_the_processors_gpt_computes_what_the_portable_one_does(tiny: Exported) -> None:
    bundle = Bundle.open(tiny.bundle)
    portable = graph_cost(bundle.graph("gpt")).multiply_adds
    whole = stage_runs(bundle, shown("onnxruntime", {"gpt": [0.5]}))
    assert whole["gpt"].cost.multiply_adds == portable
    split = stage_runs(bundle, shown("onnxruntime", {"gpt": [0.1], "prefill": [0.4]}))
    last, ahead = (split[name].cost.multiply_adds for name in ("gpt", "prefill"))
    assert last < ahead < portable <= last + ahead
    # Both read the same weights, which are on disk once.
    assert total_weights(split) == total_weights(whole)


def test_integer_products_count_like_others() -> None:
    weights = numpy_helper.from_array(np.ones((6, 10), np.int8), "w")
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT8, (4, 6))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (4, 10))],
        [weights],
    )
    assert graph_cost(helper.make_model(graph).SerializeToString()) == Cost(60, 4 * 6 * 10)


def test_arithmetic_that_is_not_known_is_refused_not_ignored() -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4))],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    with pytest.raises(ValueError, match="MatMulNBits"):
        graph_cost(model.SerializeToString())


@pytest.mark.parametrize(
    ("ceilings", "bound", "ratio"),
    [
        (Ceilings("slow memory", 1e6, {"fp32": 1e12}), 4.0, 1.5),
        (Ceilings("slow arithmetic", 1e12, {"fp32": 1e6}), 2.0, 3.0),
        (Ceilings("arithmetic unknown", 1e6, {}), 4.0, 1.5),
    ],
)
def test_the_bound_is_the_later_of_reading_and_computing(
    ceilings: Any, bound: Any, ratio: Any
) -> None:
    found = stage_bound(Cost(4_000_000, 1_000_000), "fp32", ceilings, 6.0)
    assert found.bound == pytest.approx(bound)
    assert found.ratio == pytest.approx(ratio)


@pytest.mark.parametrize("name", board_names())
def test_a_boards_ceilings_are_its_profiles(name: Any) -> None:
    board, ceilings = load_board(name), board_ceilings(name)
    assert 1 / ceilings.bytes_per_second == pytest.approx(board.memory_bound_ms(10**6) / 1e9)
    assert ceilings.flops["fp16"] == pytest.approx(board.fp16_tflops * 1e12)
    assert ceilings.flops["fp32"] < ceilings.flops["fp16"] < ceilings.flops["int8"]


def test_a_processors_rates_are_measured() -> None:
    """Physically possible, no more is known here."""
    assert 1e8 < measure_bandwidth(1_000_000, 1) < 1e13
    assert 1e8 < measure_gemm(1) < 1e14
