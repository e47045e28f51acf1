"""The GPU backends' own logic over a CUDA that exists in host memory only.

The stand-in defers everything on its stream until it is synchronised and keeps "device" and host
memory apart, so a forgotten copy, wait or row shows as a wrong number. Stages are ONNX Runtime on
the CPU; results must equal those of the CPU backend to the last bit.
"""

import ctypes
from typing import Any

import numpy as np
import pytest
from sizes import SMALL

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.base import Backend
from vqbet_edge.runtime.backends.cuda import (
    GRAPH_VARIABLE,
    MAPPED_VARIABLE,
    Bytes,
    Cuda,
    Device,
    HostMemory,
    Launch,
)
from vqbet_edge.runtime.backends.cuda_backend import CudaBackend
from vqbet_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.window import ObservationWindow

onnxruntime = pytest.importorskip("onnxruntime")

WINDOWED = SMALL | {"gpt_n_layer": 2, "n_obs_steps": 3}


class HostCuda(Cuda):
    """A stream that is a list, a device that is host memory."""

    stream = 7

    def __init__(self, *, integrated: bool = False) -> None:
        self.device = Device("Test", "8.7", "12.6", integrated)
        self.pending: list[Launch] = []
        self.recording: list[Launch] | None = None
        self.allocations = self.captures = self.waits = 0
        self._kept: list[Bytes] = []

    def put(self, operation: Launch) -> None:
        (self.pending if self.recording is None else self.recording).append(operation)

    def make_current(self) -> None:
        pass

    def device_memory(self, size: int) -> int:
        self.allocations += 1
        self._kept.append(np.zeros(size, np.uint8))
        return self._kept[-1].ctypes.data

    def host_memory(self, size: int) -> HostMemory:
        self.allocations += 1
        array = np.zeros(size, np.uint8)
        return HostMemory(array, array.ctypes.data)

    def to_device(self, address: int, source: Bytes) -> None:
        self.copy(address, source.ctypes.data, source.nbytes)

    def to_host(self, target: Bytes, address: int) -> None:
        self.copy(target.ctypes.data, address, target.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        assert target + size <= source or source + size <= target, "CUDA does not copy overlaps"
        self.put(lambda: ctypes.memmove(target, source, size) and None)

    def synchronize(self) -> None:
        assert self.recording is None, "CUDA refuses to wait while it captures"
        self.waits += 1
        for operation in self.pending:
            operation()
        self.pending.clear()

    def capture(self, enqueue: Launch) -> Launch:
        assert not self.pending, "captured before the warm-up was over"
        self.captures += 1
        self.recording = recorded = []
        enqueue()
        self.recording = None
        return lambda: self.pending.extend(recorded)


class HostStagesBackend(CudaBackend):
    """Stages on ONNX Runtime's CPU provider, at the addresses that the backend gives."""

    name = "test"

    def _create_stage(self, bundle: Bundle, stage: StageName) -> Launch:
        session = onnxruntime.InferenceSession(bundle.graph(stage))
        binding, spec = session.io_binding(), bundle.manifest.stages[stage]
        for bind, tensors in (
            (binding.bind_input, spec.inputs),
            (binding.bind_output, spec.outputs),
        ):
            for tensor in tensors:
                address = self._buffers[tensor.name].address
                bind(tensor.name, "cpu", 0, np.dtype(tensor.dtype), tensor.shape, address)
        return lambda: self._cuda.put(lambda: session.run_with_iobinding(binding))


@pytest.fixture(params=[1, 2], ids=["batch1", "batch2"])
def bundle(make_bundle: Any, request: pytest.FixtureRequest) -> Bundle:
    return make_bundle("fp32", request.param, **WINDOWED)


def drive(backend: Backend, bundle: Bundle) -> list[Any]:
    """Every operation of a backend, in the order in which the runtime uses them, and more."""
    random, results = np.random.default_rng(0), []
    spec = {t.name: t for s in bundle.manifest.stages.values() for t in s.inputs}
    frames_shape, states_shape = spec["frames"].shape, spec["states"].shape

    def frames() -> Any:
        return random.integers(0, 256, frames_shape, np.uint8)

    def states() -> Any:
        return random.standard_normal(states_shape, np.float32)

    def keep(outputs: Any) -> None:
        results.extend(part.copy() for part in outputs)

    newest = states_shape[1] - 1
    backend.encode(frames(), newest)
    backend.fill()
    keep(backend.predict(states()))
    for step in range(6):
        backend.advance()
        if step % 2:
            backend.encode(frames(), newest)
            keep(backend.predict(states()))
        else:
            keep(backend.replan(frames(), states(), prefilled=False))
    backend.encode(frames(), 0)  # an older row, as when a frame was skipped
    keep(backend.predict(states()))
    codes = random.integers(0, 16, (states_shape[0], 2))
    results.append(backend.decode(codes).copy())
    return results


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("capture", [False, True])
def test_the_same_numbers_as_on_the_cpu(bundle: Bundle, *, integrated: bool, capture: bool) -> None:
    backend = HostStagesBackend(bundle, HostCuda(integrated=integrated), capture=capture)
    for ours, theirs in zip(
        drive(backend, bundle), drive(OnnxRuntimeBackend(bundle), bundle), strict=True
    ):
        # The CPU takes another graph of the same GPT.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_window_drives_it(bundle: Bundle) -> None:
    """As above through the runtime's window, which skips frames that are never needed."""

    def run(backend: Backend) -> list[Any]:
        random, window, results = (
            np.random.default_rng(1),
            ObservationWindow(bundle.manifest, backend, 0),
            [],
        )
        for step in range(12):
            slot = window.take_slot()
            slot.frames[:] = random.integers(0, 256, slot.frames.shape, np.uint8)
            slot.states[:] = random.standard_normal(slot.states.shape)
            window.append(slot)
            if step % 4 == 0:
                results.extend(part.copy() for part in window.predict())
        return results

    ours = run(HostStagesBackend(bundle, HostCuda(), capture=True))
    for mine, theirs in zip(ours, run(OnnxRuntimeBackend(bundle)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_is_allocated_or_captured_after_loading(bundle: Bundle) -> None:
    cuda = HostCuda()
    backend = HostStagesBackend(bundle, cuda, capture=True)
    loaded = cuda.allocations, cuda.captures
    outputs = [backend.predict(np.zeros_like(backend._arrays["states"])) for _ in range(2)]
    drive(backend, bundle)
    assert (cuda.allocations, cuda.captures) == loaded
    assert cuda.captures == 3  # re-planning, predicting, decoding
    assert outputs[0].logits is outputs[1].logits


def test_one_wait_per_replan(bundle: Bundle) -> None:
    cuda = HostCuda()
    backend = HostStagesBackend(bundle, cuda, capture=True)
    frames, states = (np.zeros_like(backend._arrays[name]) for name in ("frames", "states"))
    before = cuda.waits
    backend.advance()
    backend.replan(frames, states, prefilled=False)
    assert cuda.waits == before + 1
    assert set(backend.seconds) == {"replan"}


@pytest.mark.parametrize("capture", [False, True])
def test_stages_alone(bundle: Bundle, *, capture: bool) -> None:
    cuda = HostCuda()
    backend = HostStagesBackend(bundle, cuda, capture=capture)
    before = cuda.captures
    launches = backend.stage_launches()
    assert cuda.captures - before == (len(bundle.stages_to_load) if capture else 0)
    for stage, launch in launches.items():
        waits = cuda.waits
        launch()
        assert cuda.waits == waits + 1
        assert backend.seconds[stage] > 0


@pytest.mark.parametrize(("value", "captures"), [("0", 0), ("1", 3), ("", 3)])
def test_the_switch_for_cuda_graphs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, value: str, captures: int
) -> None:
    monkeypatch.setenv(GRAPH_VARIABLE, value)
    cuda = HostCuda()
    HostStagesBackend(bundle, cuda, capture=True)
    assert cuda.captures == captures


@pytest.mark.parametrize(
    ("integrated", "value", "mapped"), [(True, "", True), (True, "0", False), (False, "1", True)]
)
def test_the_switch_for_mapped_memory(
    monkeypatch: pytest.MonkeyPatch, *, integrated: bool, value: str, mapped: bool
) -> None:
    monkeypatch.setenv(MAPPED_VARIABLE, value)
    cuda = HostCuda(integrated=integrated)
    buffer = cuda.buffer(16, host=True)
    assert buffer.mapped is mapped
    assert (buffer.address == buffer.host.ctypes.data) is mapped
    cuda.upload(buffer)
    cuda.download(buffer)
    assert len(cuda.pending) == (0 if mapped else 2)


def test_a_switch_with_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAPPED_VARIABLE, "yes")
    with pytest.raises(BackendError, match=f"{MAPPED_VARIABLE} to be 0 or 1, got 'yes'"):
        HostCuda().buffer(16, host=True)


def test_the_decoder_is_warmed_up(bundle: Bundle) -> None:
    """Its first run must not be the robot's: there it would load code and allocate."""
    runs = []

    class Backend(HostStagesBackend):
        def _create_stage(self, bundle: Bundle, stage: StageName) -> Launch:
            put = super()._create_stage(bundle, stage)
            return lambda: (runs.append(stage), put())[1]

    Backend(bundle, HostCuda(), capture=False)
    assert runs.count("rvq_decoder") >= 3


def test_seconds_are_those_of_the_latest_prediction(bundle: Bundle) -> None:
    backend = HostStagesBackend(bundle, HostCuda(), capture=True)
    frames, states = (np.zeros_like(backend._arrays[name]) for name in ("frames", "states"))
    codes = np.zeros((len(frames), 2), np.int64)
    backend.encode(frames, 0)
    backend.encode(frames, 1)
    backend.predict(states)
    backend.decode(codes)
    assert set(backend.seconds) == {"encode", "predict", "rvq_decoder"}
    backend.replan(frames, states, prefilled=False)
    assert set(backend.seconds) == {"replan"}
    backend.encode(frames, 0)
    backend.replan(frames, states, prefilled=False)
    assert set(backend.seconds) == {"encode", "replan"}
    backend.predict(states)
    assert set(backend.seconds) == {"predict"}
