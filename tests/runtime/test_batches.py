"""One run of the CPU's transformer for several windows: each gets what it would get alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import miniature
import numpy as np
import onnx
import oracle
import pytest
from vqbet_calibration.blocks import Blocks
from workshop import Workshop

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.backends.base import GptRun
from vqbet_edge.runtime.backends.cpu import CpuBackend, CpuWindow
from vqbet_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName

PARTS: tuple[GptRun, ...] = get_args(GptRun)
Altered = Callable[[bytes], bytes]


class _Altered(OnnxRuntimeBackend):
    """The bundle's graphs, the GPT's altered."""

    def __init__(self, bundle: Bundle, alter: Altered) -> None:
        self._alter = alter
        super().__init__(bundle)

    def _load(self, stage: StageName, data: bytes) -> Any:
        return super()._load(stage, self._alter(data) if stage == "gpt" else data)


def in_blocks(data: bytes) -> bytes:
    """INT8, as bundles for CPUs have it."""
    blocks = Blocks(data)
    quantized = blocks.quantize(data, dict.fromkeys(blocks.layers, "blocks of 32"))
    assert b"MatMulNBits" in quantized
    return quantized


def for_one_window(data: bytes) -> bytes:
    """The graph as it was before its batch axis was free."""
    model = onnx.load_from_string(data)
    for value in model.graph.input:
        if value.name in {"image_tokens", "states", "past"}:
            dims = value.type.tensor_type.shape.dim
            dims[1 if value.name == "past" else 0].dim_value = 1
    return model.SerializeToString()


# How far rounding goes, of the largest value: of float32, of float16, of one step of INT8.
LIMITS = {"fp32": 1e-5, "fp16": 5e-3, "int8": 1 / 127}


@pytest.fixture(params=LIMITS)
def backend(request: pytest.FixtureRequest, workshop: Workshop) -> CpuBackend:
    half = request.param == "fp16"
    bundle = Bundle.open(workshop.bundle(oracle.TINY, "fp16" if half else "fp32").bundle)
    alter: Altered = in_blocks if request.param == "int8" else bytes
    return _Altered(bundle, alter)


def filled(backend: CpuBackend, part: GptRun, count: int) -> list[CpuWindow]:
    random = np.random.default_rng(count)
    windows = [backend.create_window() for _ in range(count)]
    for window in windows:
        for name, array in window.parts[part].inputs.items():
            if name not in {"constants", "mask"}:
                array[...] = random.standard_normal(array.shape)
    return windows


def outputs(window: CpuWindow, part: GptRun) -> np.ndarray:
    (array,) = window.parts[part].outputs.values()
    return array.copy()


@pytest.mark.parametrize("part", PARTS)
def test_together_as_alone(
    backend: CpuBackend, part: GptRun, request: pytest.FixtureRequest
) -> None:
    limit = LIMITS[request.node.callspec.params["backend"]]
    assert backend.most_together > 1
    for count in (2, 3, backend.most_together):
        windows = filled(backend, part, count)
        backend.run_together(part, windows)
        together = [outputs(window, part) for window in windows]
        for window, got in zip(windows, together, strict=True):
            window.run_alone(part)
            alone = outputs(window, part)
            assert alone.any()
            assert np.abs(got - alone).max() <= limit * np.abs(alone).max()


@pytest.mark.parametrize("part", PARTS)
def test_what_a_neighbour_sees_changes_nothing(backend: CpuBackend, part: GptRun) -> None:
    """Bitwise, in the same place of as large a batch: no scale, no reduction is common to two."""
    windows = filled(backend, part, 3)
    backend.run_together(part, windows)
    before = outputs(windows[1], part)
    for value in (1e3, 0.0, np.inf, np.nan):
        for neighbour in (windows[0], windows[2]):
            for name in ("image_tokens", "states", "past"):
                neighbour.parts[part].inputs[name][...] = value
        backend.run_together(part, windows)
        assert outputs(windows[1], part).tobytes() == before.tobytes()
    assert not np.isfinite(outputs(windows[0], part)).all()


def test_bundles_from_before_run_each_window_alone(mini: Path) -> None:
    bundle = Bundle.open(mini)
    before = _Altered(bundle, for_one_window)
    assert before.shared_parts == ()
    random = np.random.default_rng(0)
    with EdgePolicy(bundle, before, seed=1) as old, EdgePolicy.load(mini, seed=1) as new:
        for _ in range(12):
            seen = miniature.observation(random)
            assert old.act(seen).tobytes() == new.act(seen).tobytes()
