"""Counts of weights and multiply-adds, against PyTorch's own counter."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode
from vqbet_bench.ceilings import board_ceilings, measure_bandwidth, measure_gemm
from vqbet_bench.results import Ceilings
from vqbet_bench.roofline import Cost, Run, bound, graph_cost, stage_runs, total_weights
from vqbet_calibration.blocks import Blocks
from vqbet_engines.boards import board_names, load_board
from vqbet_export.stages import CodeHeadsStage, GptStage, RvqDecoderStage, VisionEncoderStage
from workshop import Exported

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.signatures import signature
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
        for t in signature(bundle.manifest, stage).inputs
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


@pytest.mark.parametrize("on_processor", [True, False])
def test_weights_are_the_graphs_initializers(tiny: Exported, on_processor: bool) -> None:
    bundle = Bundle.open(tiny.bundle)
    runs = stage_runs(bundle, on_processor=on_processor, prefilled=False)
    assert set(runs) == set(bundle.stages_to_load)
    for stage, run in runs.items():
        data = bundle.cpu_graph(stage) if on_processor else bundle.graph(stage)
        arrays = [numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer]
        assert run.cost.weight_bytes == sum(array.nbytes for array in arrays)
    assert total_weights(runs) == sum(run.cost.weight_bytes for run in runs.values())


def test_the_processors_gpt_computes_what_the_plain_one_does(tiny: Exported) -> None:
    bundle = Bundle.open(tiny.bundle)
    plain = graph_cost(bundle.graph("gpt")).multiply_adds
    whole = stage_runs(bundle, on_processor=True, prefilled=False)
    assert whole["gpt"].cost.multiply_adds == plain
    split = stage_runs(bundle, on_processor=True, prefilled=True)
    last, ahead = (split[name].cost.multiply_adds for name in ("gpt", "prefill"))
    assert last < ahead < plain <= last + ahead
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


def test_products_with_weights_in_blocks_count_like_others(tiny: Exported) -> None:
    graph = Bundle.open(tiny.bundle).graph("gpt")
    quantizer = Blocks(graph)
    blocks = quantizer.quantize(graph, dict.fromkeys(quantizer.layers, "blocks of 32"))
    before, after = graph_cost(graph), graph_cost(blocks)
    assert after.multiply_adds == before.multiply_adds
    assert after.weight_bytes < before.weight_bytes / 2


def test_arithmetic_that_is_not_known_is_refused_not_ignored() -> None:
    graph = helper.make_graph(
        [helper.make_node("FusedMatMul", ["x"], ["y"], domain="com.microsoft")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4))],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    with pytest.raises(ValueError, match="FusedMatMul"):
        graph_cost(model.SerializeToString())


@pytest.mark.parametrize(
    ("ceilings", "expected", "ratio"),
    [
        (Ceilings("slow memory", 1e6, {"fp32": 1e12}), 4.0, 1.5),
        (Ceilings("slow arithmetic", 1e12, {"fp32": 1e6}), 2.0, 3.0),
        (Ceilings("arithmetic unknown", 1e6, {}), 4.0, 1.5),
    ],
)
def test_the_bound_is_the_later_of_reading_and_computing(
    ceilings: Any, expected: Any, ratio: Any
) -> None:
    run = Run("gpt", "fp32", Cost(4_000_000, 1_000_000))
    found = bound(run, ceilings, 6.0)
    assert found.bound == pytest.approx(expected)
    assert found.ratio == pytest.approx(ratio)
    assert bound(run, ceilings, None).ratio is None


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
