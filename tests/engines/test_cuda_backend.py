"""The GPU backends' own logic over a CUDA that exists in host memory only.

The stand-in defers everything on a stream until that is waited for, so a forgotten copy, wait or
row shows as a wrong number. Stages are ONNX Runtime on the CPU; results must equal those of the CPU
backend.
"""

import contextlib
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from fake_driver import OTHERS, FakeDriver
from sizes import SMALL

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends import forks
from vqbet_edge.runtime.backends.base import Backend, Window
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.cuda_backend import GRAPH_VARIABLE, CudaBackend
from vqbet_edge.runtime.backends.cuda_execution import Execution
from vqbet_edge.runtime.backends.cuda_stream import (
    BLOCK_VARIABLE,
    MAPPED_VARIABLE,
    Launch,
    Stream,
)
from vqbet_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.proof import prove
from vqbet_edge.runtime.window import ObservationWindow

onnxruntime = pytest.importorskip("onnxruntime")

WINDOWED = SMALL | {"gpt_n_layer": 2, "n_obs_steps": 3}
NOTHING = dict.fromkeys(("contexts", "memory", "streams", "events", "graphs", "executables"), 0)
FRAMES, STATES, ROWS = (1, 84, 84, 3), (3, 2), 3


class HostStages(CudaBackend):
    """Stages on ONNX Runtime's CPU provider, at the addresses that the backend gives.

    Windows have executions of their own as with TensorRT, or share one as with ONNX Runtime.
    """

    name = "test"
    shared = False
    common: Execution | None = None
    loads = 0

    def __init__(self, bundle: Bundle, driver: FakeDriver | None = None) -> None:
        self.driver = driver or FakeDriver()
        super().__init__(bundle, Cuda(self.driver))

    def _load(self, bundle: Bundle) -> None:
        self.loads += 1
        self.sessions = {
            stage: onnxruntime.InferenceSession(bundle.graph(stage))
            for stage in bundle.stages_to_load
        }
        if self.shared:
            self.common = self._new(self._stream)
            self.common.warm_up()

    def execution(self, stream: Stream) -> Execution:
        return self.common or self._new(stream)

    def _new(self, stream: Stream) -> Execution:
        execution = Execution(self.signatures, stream)
        for stage in self.sessions:
            execution.stages[stage] = self.put(stage, self.run(stage, execution), stream)
        return execution

    def run(self, stage: StageName, execution: Execution) -> Launch:
        session, expected = self.sessions[stage], self.signatures[stage]
        binding = session.io_binding()
        for bind, tensors in (
            (binding.bind_input, expected.inputs),
            (binding.bind_output, expected.outputs),
        ):
            for tensor in tensors:
                address = execution.buffers[tensor.name].address
                bind(tensor.name, "cpu", 0, np.dtype(tensor.dtype), tensor.shape, address)
        return lambda: session.run_with_iobinding(binding)

    def put(self, stage: StageName, run: Launch, stream: Stream) -> Launch:
        del stage
        driver, handle = self.driver, stream.handle
        return lambda: driver.put(handle, run)


class SharedStages(HostStages):
    shared = True


KINDS = pytest.mark.parametrize("kind", [HostStages, SharedStages])


@pytest.fixture
def bundle(make_bundle: Any) -> Bundle:
    return make_bundle("fp32", **WINDOWED)


@pytest.fixture(scope="module")
def proving(mini_of_3: Path) -> Bundle:
    """A bundle as exported, with reference cases."""
    return Bundle.open(mini_of_3)


def drive(window: Window, seed: int = 0) -> list[Any]:
    """Every operation of a window, in the order in which the runtime uses them, and more."""
    return [result for step in steps(window, seed) for result in step]


def steps(window: Window, seed: int) -> Any:
    random = np.random.default_rng(seed)
    newest = ROWS - 1

    def frames() -> Any:
        return random.integers(0, 256, FRAMES, np.uint8)

    def states() -> Any:
        return random.standard_normal(STATES, np.float32)

    def copies(outputs: Any) -> list[Any]:
        return [part.copy() for part in outputs]

    window.encode(frames(), newest)
    window.fill()
    yield copies(window.predict(states()))
    for step in range(6):
        window.advance()
        if step % 2:
            window.encode(frames(), newest)
            window.advance()
            yield []
            window.encode(frames(), newest)
            yield copies(window.predict(states()))
        else:
            yield copies(window.replan(frames(), states(), prefilled=False))
    window.encode(frames(), 0)  # an older row, as when a frame was skipped
    yield copies(window.predict(states()))
    yield [window.decode(random.integers(0, 16, 2)).copy()]


def same(ours: list[Any], theirs: list[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


@KINDS
@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("capture", ["0", "1"])
def test_the_same_numbers_as_on_the_cpu(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    *,
    kind: type[HostStages],
    integrated: bool,
    capture: str,
) -> None:
    monkeypatch.setenv(GRAPH_VARIABLE, capture)
    window = kind(bundle, FakeDriver(integrated=integrated)).create_window()
    expected = drive(OnnxRuntimeBackend(bundle).create_window())
    for ours, theirs in zip(drive(window), expected, strict=True):
        # The CPU takes another graph of the same GPT.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_window_drives_it(bundle: Bundle) -> None:
    """As above through the runtime's window, which skips frames that are never needed."""

    def run(backend: Backend) -> list[Any]:
        random, results = np.random.default_rng(1), []
        window = ObservationWindow(bundle.manifest, backend.create_window(), 0)
        for step in range(9):
            slot = window.next_slot()
            slot.frames[:] = random.integers(0, 256, slot.frames.shape, np.uint8)
            slot.state[:] = random.standard_normal(slot.state.shape, np.float32)
            window.append(window.take_slot())
            if step % 4 == 1:
                window.encode_newest()
            if step % 4 == 0:
                results.extend(part.copy() for part in window.predict())
        return results

    for ours, theirs in zip(run(HostStages(bundle)), run(OnnxRuntimeBackend(bundle)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("integrated", [False, True])
def test_siblings_are_as_if_alone(
    bundle: Bundle, *, kind: type[HostStages], integrated: bool
) -> None:
    """Interleaved at every step, each with a history of its own, on weights that are loaded once."""
    alone = [drive(kind(bundle).create_window(), seed) for seed in range(3)]
    backend = kind(bundle, FakeDriver(integrated=integrated))
    results: list[list[Any]] = [[] for _ in alone]
    for together in zip(*(steps(backend.create_window(), seed) for seed in range(3)), strict=True):
        for result, step in zip(results, together, strict=True):
            result.extend(step)
    for mine, expected in zip(results, alone, strict=True):
        same(mine, expected)
    assert backend.loads == 1
    assert backend.driver.misuses == []


@KINDS
@pytest.mark.parametrize("integrated", [False, True])
def test_what_passes_between_graphs_can_be_read(
    bundle: Bundle, *, kind: type[HostStages], integrated: bool
) -> None:
    """As on the CPU, and without growing by every robot that is proven."""
    frames, states = np.full(FRAMES, 9, np.uint8), np.ones(STATES, np.float32)

    def read(window: Window) -> list[Any]:
        window.encode(frames, ROWS - 1)
        window.fill()
        window.predict(states)
        return [window.read("frame_tokens"), window.read("feature")]

    expected = read(OnnxRuntimeBackend(bundle).create_window())
    backend = kind(bundle, FakeDriver(integrated=integrated))
    keeps = backend.create_window()
    read(keeps)
    before = backend.driver.books
    for _ in range(3):
        with contextlib.closing(backend.create_window()) as window:
            for ours, theirs in zip(read(window), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert backend.driver.books == before
    keeps.close()
    assert backend.driver.books == NOTHING


@KINDS
def test_siblings_in_threads(bundle: Bundle, kind: type[HostStages]) -> None:
    alone = [drive(kind(bundle).create_window(), seed) for seed in range(3)]
    backend = kind(bundle)
    results: dict[int, list[Any]] = {}

    def work(seed: int) -> None:  # windows are created while others run
        results[seed] = drive(backend.create_window(), seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        same(results[seed], expected)


def zeros() -> tuple[Any, Any]:
    return np.zeros(FRAMES, np.uint8), np.zeros(STATES, np.float32)


@KINDS
def test_policies_act_on_it(bundle: Bundle, kind: type[HostStages]) -> None:
    """Queued steps included, whose frames are encoded behind the robot's program's back."""

    def actions(policy: EdgePolicy) -> Any:
        random = np.random.default_rng(5)
        return np.stack(
            [
                policy.act(
                    {
                        "observation.image": random.integers(0, 256, (96, 96, 3), np.uint8),
                        "observation.state": random.standard_normal(2).astype(np.float32),
                    }
                )
                for _ in range(20)
            ]
        )

    expected = actions(EdgePolicy(bundle, OnnxRuntimeBackend(bundle), temperature=0))
    driver = FakeDriver()
    with EdgePolicy(bundle, kind(bundle, driver), temperature=0) as policy:
        np.testing.assert_allclose(actions(policy), expected, rtol=1e-5, atol=1e-5)
        with policy.sibling() as sibling:
            np.testing.assert_array_equal(actions(sibling), actions(policy.sibling()))
    del policy, sibling
    gc.collect()
    assert driver.books == NOTHING
    assert driver.misuses == []


@KINDS
def test_nothing_is_allocated_after_loading(bundle: Bundle, kind: type[HostStages]) -> None:
    backend = kind(bundle)
    window = backend.create_window()
    before = backend.driver.books
    drive(window)
    assert backend.driver.books == before


def test_one_launch_and_one_wait_per_replan(bundle: Bundle) -> None:
    backend = HostStages(bundle)
    window = backend.create_window()
    window.advance()
    backend.driver.calls.clear()
    window.replan(*zeros(), prefilled=False)
    assert backend.driver.calls == {
        "cuCtxPushCurrent": 1,
        "cuGraphLaunch": 1,
        "cuEventRecord": 1,
        "cuEventSynchronize": 1,
        "cuCtxPopCurrent": 1,
    }
    assert set(window.seconds) == {"replan"}


def test_a_queued_step_waits_for_nothing(bundle: Bundle) -> None:
    """Its frames are encoded by a captured launch while the robot's program goes on."""
    backend = HostStages(bundle)
    window = backend.create_window()
    frames, states = zeros()
    window.predict(states)
    backend.driver.calls.clear()
    window.advance()
    window.encode(frames, ROWS - 1)
    assert backend.driver.calls["cuEventSynchronize"] == 0
    assert backend.driver.calls["cuGraphLaunch"] == 1
    # The frames' buffer is the GPU's until it has read them.
    window.encode(frames, ROWS - 1)
    assert backend.driver.calls["cuEventSynchronize"] == 1


@pytest.mark.parametrize("capture", ["0", "1"])
def test_stages_alone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capture: str) -> None:
    monkeypatch.setenv(GRAPH_VARIABLE, capture)
    backend = HostStages(bundle)
    window = backend.create_window()
    before = backend.driver.books["executables"]
    launches = window.stage_launches()
    captured = len(bundle.stages_to_load) if capture == "1" else 0
    assert backend.driver.books["executables"] - before == captured
    for stage, launch in launches.items():
        backend.driver.calls.clear()
        launch()
        assert backend.driver.calls["cuEventSynchronize"] == 1
        assert window.seconds[stage] > 0


@pytest.mark.parametrize(("value", "captures"), [("0", 0), ("1", 4), ("", 4)])
def test_the_switch_for_cuda_graphs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, value: str, captures: int
) -> None:
    monkeypatch.setenv(GRAPH_VARIABLE, value)
    assert HostStages(bundle).driver.books["executables"] == captures


@pytest.mark.parametrize(
    ("integrated", "value", "mapped"), [(True, "", True), (True, "0", False), (False, "1", True)]
)
def test_the_switch_for_mapped_memory(
    monkeypatch: pytest.MonkeyPatch, *, integrated: bool, value: str, mapped: bool
) -> None:
    monkeypatch.setenv(MAPPED_VARIABLE, value)
    driver = FakeDriver(integrated=integrated)
    stream = Stream(Cuda(driver))
    with stream.active():
        buffer = stream.buffer(16, host=True)
        assert buffer.host is not None
        assert buffer.mapped is mapped
        assert (buffer.address == buffer.host.ctypes.data) is mapped
        driver.calls.clear()
        stream.upload(buffer)
        stream.download(buffer)
    assert driver.calls["cuMemcpyHtoDAsync"] == driver.calls["cuMemcpyDtoHAsync"] == (not mapped)


def test_a_switch_with_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAPPED_VARIABLE, "yes")
    stream = Stream(Cuda(FakeDriver()))
    with (
        stream.active(),
        pytest.raises(BackendError, match=f"{MAPPED_VARIABLE} to be 0 or 1, got 'yes'"),
    ):
        stream.buffer(16, host=True)


@pytest.mark.parametrize(("value", "context", "event"), [("1", 4, 3), ("0", 1, 2), ("", 1, 2)])
def test_waiting_is_chosen_before_the_context_is_made(
    monkeypatch: pytest.MonkeyPatch, value: str, context: int, event: int
) -> None:
    """And events take no times, which costs."""
    monkeypatch.setenv(BLOCK_VARIABLE, value)
    driver = FakeDriver()
    stream = Stream(Cuda(driver))
    assert driver.flags == context
    assert [e.flags for e in driver.events.values()] == [event]
    calls = list(driver.calls)
    assert calls.index("cuDevicePrimaryCtxSetFlags") < calls.index("cuDevicePrimaryCtxRetain")
    stream.close()


def test_another_librarys_context_keeps_its_flags() -> None:
    driver = FakeDriver()
    driver.retained, driver.flags = 1, 2
    stream = Stream(Cuda(driver))
    assert driver.flags == 2
    stream.close()
    assert driver.retained == 1


def test_memory_is_zeroed_on_its_own_stream() -> None:
    """One that does not block would not wait for the default stream."""
    driver = FakeDriver()
    stream = Stream(Cuda(driver))
    with stream.active():
        buffer = stream.buffer(16, host=False)
        stream.synchronize()
    assert driver.calls["cuMemsetD8Async"] == 1
    assert not driver.memory[buffer.address].any()


def test_the_decoder_is_warmed_up(bundle: Bundle) -> None:
    """Its first run must not be the robot's: there it would load code and allocate."""
    runs = []

    class Counting(HostStages):
        def put(self, stage: StageName, run: Launch, stream: Stream) -> Launch:
            put = super().put(stage, run, stream)
            return lambda: (runs.append(stage), put())[1]

    Counting(bundle)
    assert runs.count("rvq_decoder") >= 3


def test_seconds_are_those_of_the_latest_prediction(bundle: Bundle) -> None:
    window = HostStages(bundle).create_window()
    frames, states = zeros()
    window.encode(frames, 0)
    window.encode(frames, 1)
    window.predict(states)
    window.decode(np.zeros(2, np.int64))
    assert set(window.seconds) == {"encode", "predict", "rvq_decoder"}
    window.replan(frames, states, prefilled=False)
    assert set(window.seconds) == {"replan"}
    window.encode(frames, 0)
    window.replan(frames, states, prefilled=False)
    assert set(window.seconds) == {"encode", "replan"}
    window.predict(states)
    assert set(window.seconds) == {"predict"}


@KINDS
@pytest.mark.parametrize("integrated", [False, True])
def test_a_bundle_proves_itself(proving: Bundle, kind: type[HostStages], integrated: bool) -> None:
    """What passes between stages is read from the GPU; the policy's own window is left alone."""
    driver = FakeDriver(integrated=integrated)
    backend = kind(proving, driver)
    policy = EdgePolicy(proving, backend)
    observation = miniature.observation(np.random.default_rng(0))
    expected = policy.act_chunk(observation, codes=(0, 0))
    policy.reset()
    proof = prove(proving, backend)
    assert max(result.relative_error for result in proof.stages.values()) < 2e-5
    np.testing.assert_array_equal(policy.act_chunk(observation, codes=(0, 0)), expected)
    policy.close()
    assert driver.books == NOTHING
    assert driver.misuses == []


@KINDS
def test_closing_frees_everything(bundle: Bundle, kind: type[HostStages]) -> None:
    """In whatever order, once; the last window takes the backend with it."""
    backend = kind(bundle)
    first, second = backend.create_window(), backend.create_window()
    expected = drive(kind(bundle).create_window())
    first.close()
    same(drive(second), expected)
    first.close()
    assert not backend.closed
    second.close()
    assert backend.closed
    assert backend.driver.books == NOTHING
    backend.close()
    second.close()
    assert backend.driver.books == NOTHING
    assert backend.driver.misuses == []
    with pytest.raises(BackendError, match="closed; load the policy again"):
        second.predict(zeros()[1])
    with pytest.raises(BackendError, match="closed; load the policy again"):
        backend.create_window()


@KINDS
def test_a_backend_closes_its_windows(bundle: Bundle, kind: type[HostStages]) -> None:
    backend = kind(bundle)
    window = backend.create_window()
    window.encode(zeros()[0], 0)  # still on the stream
    backend.close()
    assert window.closed
    assert backend.driver.books == NOTHING
    assert backend.driver.misuses == []


@KINDS
def test_what_nobody_holds_is_freed(bundle: Bundle, kind: type[HostStages]) -> None:
    driver = FakeDriver()
    backend = kind(bundle, driver)
    window = backend.create_window()
    window.encode(zeros()[0], 0)
    del backend, window
    gc.collect()
    assert driver.books == NOTHING
    assert driver.misuses == []


def test_a_dropped_window_needs_no_garbage_collection(bundle: Bundle) -> None:
    driver = FakeDriver()
    gc.disable()
    try:
        backend = HostStages(bundle, driver)
        window = backend.create_window()
        del backend, window
        assert driver.books == NOTHING
    finally:
        gc.enable()


class Instant(HostStages):
    """Stages that compute nothing, so that many can be loaded."""

    def _load(self, bundle: Bundle) -> None:
        del bundle
        self.sessions = dict.fromkeys(self.signatures)

    def run(self, stage: StageName, execution: Execution) -> Launch:
        del stage, execution
        return lambda: None


def test_ten_thousand_loads_leave_nothing(bundle: Bundle) -> None:
    """Closed or only dropped."""
    driver = FakeDriver()
    for number in range(10_000):
        window = Instant(bundle, driver).create_window()
        if number % 2:
            window.close()
        driver.log.clear()
    del window
    gc.collect()
    assert driver.books == NOTHING
    assert driver.misuses == []


def test_a_fork_frees_nothing_and_piles_nothing_up(bundle: Bundle) -> None:
    """What a forked process closes is its parent's, again and again."""
    backend = HostStages(bundle)
    window = backend.create_window()
    before = backend.driver.books
    for _ in range(3):
        child = os.fork()
        if child == 0:
            window.close()
            same = backend.driver.books == before and not window.closed
            os._exit(0 if same and not forks._HELD else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert forks._HELD == []
    window.close()
    assert backend.driver.books == NOTHING


@KINDS
def test_the_callers_context_is_its_own_again(bundle: Bundle, kind: type[HostStages]) -> None:
    """A robot's program uses CUDA between two calls, with a context of its own or of torch's."""
    driver = FakeDriver()
    driver.stack.append(OTHERS)
    backend = kind(bundle, driver)
    assert driver.stack == [OTHERS]
    window = backend.create_window()
    for _ in steps(window, 0):
        assert driver.stack == [OTHERS]
    driver.stack.append(OTHERS + 1)  # the program pushes another
    window.predict(zeros()[1])
    assert driver.stack == [OTHERS, OTHERS + 1]
    window.close()
    assert driver.stack == [OTHERS, OTHERS + 1]


class Uncapturable(HostStages):
    """As a library that does in a capture what must not be done there."""

    def __init__(self, bundle: Bundle, inside: Callable[[FakeDriver], object]) -> None:
        self.inside = inside
        super().__init__(bundle)

    def put(self, stage: StageName, run: Launch, stream: Stream) -> Launch:
        put, driver = super().put(stage, run, stream), self.driver

        def enqueue() -> None:
            if stage == "gpt" and driver.capturing():
                self.inside(driver)
            put()

        return enqueue


def fail(_driver: FakeDriver) -> None:
    raise RuntimeError("not while capturing")


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        (fail, "not while capturing"),
        (lambda driver: driver.cuMemAlloc(8), "CAPTURE_INVALIDATED"),
        (lambda driver: driver.cuStreamSynchronize(next(iter(driver.streams))), "replay"),
    ],
    ids=["raises", "allocates", "waits for another"],
)
def test_a_capture_that_fails_is_done_without(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, inside: Any, reason: str
) -> None:
    backend = Uncapturable(bundle, inside)
    window = backend.create_window()
    expected = drive(HostStages(bundle).create_window())
    same(drive(window), expected)
    said = [m for m in caplog.messages if m.startswith("acting without CUDA graphs")]
    if reason == "replay":  # waiting for another stream is allowed
        assert said == []
    else:
        assert len(said) == 1
        assert reason in said[0]
        assert backend.driver.books["graphs"] == 0
    assert not any(stream.capture for stream in backend.driver.streams.values())
    window.close()
    assert backend.driver.books == NOTHING


def test_no_garbage_is_collected_inside_a_capture(bundle: Bundle) -> None:
    """It may be another library's GPU memory, and freeing that spoils the capture."""
    seen = []
    backend = Uncapturable(bundle, lambda _driver: seen.append(gc.isenabled()))
    assert seen
    assert not any(seen)
    assert gc.isenabled()
    backend.close()


class Failing(HostStages):
    """A stage that fails on the GPU, after the call that put it there has returned."""

    broken = False

    def run(self, stage: StageName, execution: Execution) -> Launch:
        run = super().run(stage, execution)

        def work() -> None:
            if self.broken and stage == "vision_encoder":
                self.driver.check_memory(0, 8)
            run()

        return work


def test_what_fails_behind_a_queued_step_is_raised_by_the_next_prediction(bundle: Bundle) -> None:
    backend = Failing(bundle)
    window = backend.create_window()
    frames, states = zeros()
    backend.broken = True
    window.encode(frames, 1)
    with pytest.raises(BackendError, match="ILLEGAL_ADDRESS"):
        window.predict(states)
    with pytest.raises(BackendError, match="ILLEGAL_ADDRESS"):  # as every later call on a GPU
        window.predict(states)


def test_a_foreign_error_while_acting(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRAPH_VARIABLE, "0")
    window = HostStages(bundle).create_window()
    window._execution.stages["gpt"] = lambda: fail(FakeDriver())
    with pytest.raises(BackendError, match="RuntimeError: not while capturing"):
        window.predict(zeros()[1])
