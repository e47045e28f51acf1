"""The GPU backends over a CUDA and libraries that exist in host memory only.

The driver defers everything on a stream until that is waited for, so a forgotten copy, wait or row
shows as a wrong number. Stages are ONNX Runtime on the CPU: results must equal those of the CPU
backend. With TensorRT every window runs in contexts of its own, with ONNX Runtime's CUDA provider
all in one set of sessions.
"""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import miniature
import msgspec
import numpy as np
import pytest
from fake_driver import OTHERS, FakeDriver
from fake_tensorrt import FakeTensorRT

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends import forks, onnxruntime_cuda
from vqbet_edge.runtime.backends.base import Window
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.cuda_backend import GRAPH_VARIABLE, CudaBackend
from vqbet_edge.runtime.backends.cuda_execution import check_signature
from vqbet_edge.runtime.backends.cuda_stream import BLOCK_VARIABLE, MAPPED_VARIABLE, Stream
from vqbet_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from vqbet_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from vqbet_edge.runtime.backends.tensorrt import TensorRTBackend, _tensors
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.proof import prove
from vqbet_edge.runtime.signatures import Signature, TensorSpec, signature

onnxruntime = pytest.importorskip("onnxruntime")

NOTHING = dict.fromkeys(("contexts", "memory", "streams", "events", "graphs", "executables"), 0)
FRAMES, STATES, ROWS = (1, 20, 20, 3), (3, 2), 3
Make = Callable[[Bundle, FakeDriver], CudaBackend]


class Session:
    """A session on the CPU that says that it is on the GPU, whose work goes to the driver's stream."""

    driver: FakeDriver
    created: list["Session"]
    #: Whether it cannot be captured.
    uncapturable = False

    def __init__(self, graph: bytes, *_arguments: Any, providers: Any, **_options: Any) -> None:
        self.real = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self.options, self.stream_of, self.bound = providers[0][1], Session.driver, []
        self.runs = 0
        Session.created.append(self)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> Any:
        real = self.real.io_binding()

        def bound(bind: Any) -> Any:
            return lambda name, _, *place: (self.bound.append(name), bind(name, "cpu", *place))

        binds = bound(real.bind_input), bound(real.bind_output)
        return SimpleNamespace(real=real, bind_input=binds[0], bind_output=binds[1])

    def run_with_iobinding(self, binding: Any, _options: Any) -> None:
        self.runs += 1
        if self.uncapturable and self.options["enable_cuda_graph"] == "1" and self.runs > 1:
            raise RuntimeError("cannot capture")
        stream = int(self.options["user_compute_stream"])
        self.stream_of.put(stream, lambda: self.real.run_with_iobinding(binding.real))


def on_tensorrt(bundle: Bundle, driver: FakeDriver) -> TensorRTBackend:
    module = FakeTensorRT(bundle, driver)
    module.compute({stage: bundle.graph(stage) for stage in bundle.stages_to_load})
    plans = {stage: stage.encode() for stage in bundle.stages_to_load}
    tensorrt = TensorRT(module, "tensorrt", "10.3.0")
    return TensorRTBackend(bundle, cuda=Cuda(driver), tensorrt=tensorrt, plans=plans)


@pytest.fixture
def on_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> Make:
    module = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider"],
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        InferenceSession=Session,
    )
    monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: module)
    monkeypatch.setattr(Session, "created", [], raising=False)

    def make(bundle: Bundle, driver: FakeDriver) -> OnnxRuntimeCudaBackend:
        monkeypatch.setattr(Session, "driver", driver, raising=False)
        return OnnxRuntimeCudaBackend(bundle, cuda=Cuda(driver))

    return make


@pytest.fixture(params=["tensorrt", "onnxruntime"])
def make(request: pytest.FixtureRequest, on_onnxruntime: Make) -> Make:
    """Both GPU backends, one after the other."""
    return on_tensorrt if request.param == "tensorrt" else on_onnxruntime


INTEGRATED = pytest.mark.parametrize("integrated", [False, True])


def steps(window: Window, seed: int = 0) -> Iterator[list[Any]]:
    """Every operation of a window, in the order in which the runtime uses them, and more."""
    random, newest = np.random.default_rng(seed), ROWS - 1

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
    yield [window.decode(random.integers(0, 8, 2)).copy()]


def drive(window: Window, seed: int = 0) -> list[Any]:
    return [result for step in steps(window, seed) for result in step]


def same(ours: list[Any], theirs: list[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def nothing_is_left(driver: FakeDriver) -> None:
    assert driver.books == NOTHING
    assert driver.misuses == []


def zeros() -> tuple[Any, Any]:
    return np.zeros(FRAMES, np.uint8), np.zeros(STATES, np.float32)


@INTEGRATED
@pytest.mark.parametrize("capture", ["0", "1"])
def test_the_same_numbers_as_on_the_cpu(
    untabulated: Bundle, monkeypatch: Any, make: Make, *, integrated: bool, capture: str
) -> None:
    """And nothing is allocated for them after loading."""
    monkeypatch.setenv(GRAPH_VARIABLE, capture)
    driver = FakeDriver(integrated=integrated)
    window = make(untabulated, driver).create_window()
    expected = drive(OnnxRuntimeBackend(untabulated).create_window())
    before = driver.books
    for ours, theirs in zip(drive(window), expected, strict=True):
        # The CPU takes another graph of the same GPT.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert driver.books == before


@INTEGRATED
def test_siblings_are_as_if_alone(untabulated: Bundle, make: Make, *, integrated: bool) -> None:
    """Interleaved at every step, or in threads."""
    alone = [drive(make(untabulated, FakeDriver()).create_window(), seed) for seed in range(3)]
    driver = FakeDriver(integrated=integrated)
    backend = make(untabulated, driver)
    results: list[list[Any]] = [[] for _ in alone]
    for together in zip(*(steps(backend.create_window(), seed) for seed in range(3)), strict=True):
        for result, step in zip(results, together, strict=True):
            result.extend(step)
    threaded: dict[int, list[Any]] = {}

    def work(seed: int) -> None:  # windows are created while others run
        threaded[seed] = drive(backend.create_window(), seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        same(results[seed], expected)
        same(threaded[seed], expected)
    assert driver.misuses == []


@INTEGRATED
def test_policies_act_and_prove_themselves_on_it(
    bundle: Bundle, make: Make, *, integrated: bool
) -> None:
    """What passes between stages is read from the GPU; the policy's own window is left alone."""

    def actions(policy: EdgePolicy) -> Any:
        random = np.random.default_rng(5)
        return np.stack([policy.act(miniature.observation(random)) for _ in range(12)])

    expected = actions(EdgePolicy(bundle, OnnxRuntimeBackend(bundle), temperature=0))
    driver = FakeDriver(integrated=integrated)
    backend = make(bundle, driver)
    with EdgePolicy(bundle, backend, temperature=0) as policy:
        np.testing.assert_allclose(actions(policy), expected, rtol=1e-5, atol=1e-4)
        with policy.sibling() as sibling:
            np.testing.assert_array_equal(actions(sibling), actions(policy.sibling()))
        gc.collect()
        books = []
        for _ in range(2):  # the first one makes room for what is read
            proof = prove(bundle, backend)
            assert max(result.relative_error for result in proof.stages.values()) < 2e-5
            books.append(driver.books)
        assert books[0] == books[1]
    nothing_is_left(driver)


def test_one_launch_and_one_wait_per_replan(untabulated: Bundle) -> None:
    driver = FakeDriver()
    window = on_tensorrt(untabulated, driver).create_window()
    window.advance()
    driver.calls.clear()
    window.replan(*zeros(), prefilled=False)
    assert driver.calls == {
        "cuCtxPushCurrent": 1,
        "cuGraphLaunch": 1,
        "cuEventRecord": 1,
        "cuEventSynchronize": 1,
        "cuCtxPopCurrent": 1,
    }


def test_a_queued_step_waits_for_nothing(untabulated: Bundle) -> None:
    """Its frames are encoded by a captured launch while the robot's program goes on."""
    driver = FakeDriver()
    window = on_tensorrt(untabulated, driver).create_window()
    frames, states = zeros()
    window.predict(states)
    driver.calls.clear()
    window.advance()
    window.encode(frames, ROWS - 1)
    assert driver.calls["cuEventSynchronize"] == 0
    assert driver.calls["cuGraphLaunch"] == 1
    # The frames' buffer is the GPU's until it has read them.
    window.encode(frames, ROWS - 1)
    assert driver.calls["cuEventSynchronize"] == 1


@pytest.mark.parametrize(("value", "captures"), [("0", 0), ("1", 4), ("", 4)])
def test_the_switch_for_cuda_graphs(
    untabulated: Bundle, monkeypatch: pytest.MonkeyPatch, value: str, captures: int
) -> None:
    """Stages alone are captured too."""
    monkeypatch.setenv(GRAPH_VARIABLE, value)
    driver = FakeDriver()
    window = on_tensorrt(untabulated, driver).create_window()
    assert driver.books["executables"] == captures
    launches = window.stage_launches()
    assert driver.books["executables"] == 2 * captures
    for stage, launch in launches.items():
        driver.calls.clear()
        launch()
        assert driver.calls["cuEventSynchronize"] == 1
        assert window.seconds[stage] > 0


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
        monkeypatch.setenv(MAPPED_VARIABLE, "yes")
        with pytest.raises(BackendError, match=f"{MAPPED_VARIABLE} to be 0 or 1, got 'yes'"):
            stream.buffer(16, host=True)
    assert driver.calls["cuMemcpyHtoDAsync"] == driver.calls["cuMemcpyDtoHAsync"] == (not mapped)


@pytest.mark.parametrize(("value", "context", "event"), [("1", 4, 3), ("0", 1, 2), ("", 1, 2)])
def test_waiting_is_chosen_before_the_context_is_made(
    monkeypatch: pytest.MonkeyPatch, value: str, context: int, event: int
) -> None:
    """And events take no times, which costs. Another library's context keeps its flags."""
    monkeypatch.setenv(BLOCK_VARIABLE, value)
    driver = FakeDriver()
    stream = Stream(Cuda(driver))
    assert driver.flags == context
    assert [e.flags for e in driver.events.values()] == [event]
    calls = list(driver.calls)
    assert calls.index("cuDevicePrimaryCtxSetFlags") < calls.index("cuDevicePrimaryCtxRetain")
    stream.close()
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


def test_seconds_are_those_of_the_latest_prediction(untabulated: Bundle) -> None:
    window = on_tensorrt(untabulated, FakeDriver()).create_window()
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


def test_closing_frees_everything(untabulated: Bundle, make: Make) -> None:
    """In whatever order, once; the last window takes the backend with it, or it its windows."""
    driver = FakeDriver()
    backend = make(untabulated, driver)
    first, second = backend.create_window(), backend.create_window()
    expected = drive(make(untabulated, FakeDriver()).create_window())
    first.close()
    same(drive(second), expected)
    first.close()
    assert not backend.closed
    second.close()
    assert backend.closed
    backend.close()
    second.close()
    nothing_is_left(driver)
    for call in (lambda: second.predict(zeros()[1]), backend.create_window):
        with pytest.raises(BackendError, match="closed; load the policy again"):
            call()
    backend = make(untabulated, driver)
    window = backend.create_window()
    window.encode(zeros()[0], 0)  # still on the stream
    backend.close()
    assert window.closed
    nothing_is_left(driver)


def test_what_nobody_holds_is_freed(untabulated: Bundle, make: Make) -> None:
    driver = FakeDriver()
    backend = make(untabulated, driver)
    window = backend.create_window()
    window.encode(zeros()[0], 0)
    del backend, window
    gc.collect()
    nothing_is_left(driver)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.extended)])
def test_loads_leave_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Closed or only dropped, which needs no garbage collection. Stages compute nothing here."""
    monkeypatch.setattr(FakeTensorRT, "compute", lambda *_: None)
    monkeypatch.setattr(fake_tensorrt.Context, "run", lambda _: None)
    driver = FakeDriver()
    gc.disable()
    try:
        for number in range(count):
            window = on_tensorrt(bundle, driver).create_window()
            if number % 2:
                window.close()
            driver.log.clear()
        del window
        nothing_is_left(driver)
    finally:
        gc.enable()


def test_a_fork_frees_nothing_and_piles_nothing_up(bundle: Bundle) -> None:
    """What a forked process closes is its parent's, again and again."""
    driver = FakeDriver()
    window = on_tensorrt(bundle, driver).create_window()
    before = driver.books
    for _ in range(3):
        child = os.fork()
        if child == 0:
            window.close()
            same = driver.books == before and not window.closed
            os._exit(0 if same and not forks._HELD else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert forks._HELD == []
    window.close()
    assert driver.books == NOTHING


def test_the_callers_context_is_its_own_again(bundle: Bundle, make: Make) -> None:
    """A robot's program uses CUDA between two calls, with a context of its own or of torch's."""
    driver = FakeDriver()
    driver.stack.append(OTHERS)
    window = make(bundle, driver).create_window()
    for _ in range(3):
        window.advance()
        window.replan(*zeros(), prefilled=False)
        assert driver.stack == [OTHERS]
    driver.stack.append(OTHERS + 1)  # the program pushes another
    window.predict(zeros()[1])
    assert driver.stack == [OTHERS, OTHERS + 1]
    window.close()
    assert driver.stack == [OTHERS, OTHERS + 1]


def fail(_driver: FakeDriver) -> None:
    raise RuntimeError("not while capturing")


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        (fail, "not while capturing"),
        (lambda driver: driver.cuMemAlloc(8), "CAPTURE_INVALIDATED"),
        (lambda driver: driver.cuStreamSynchronize(next(iter(driver.streams))), ""),
    ],
    ids=["raises", "allocates", "waits for another, which is allowed"],
)
def test_a_capture_that_fails_is_done_without(
    untabulated: Bundle,
    monkeypatch: Any,
    caplog: pytest.LogCaptureFixture,
    inside: Any,
    reason: str,
) -> None:
    """And no garbage is collected inside it: freeing another library's memory would spoil it."""
    execute, collected = fake_tensorrt.Context.execute_async_v3, []

    def enqueue(context: Any, stream: int) -> bool:
        driver = context.module.driver
        if context.stage == "gpt" and driver.capturing():
            collected.append(gc.isenabled())
            inside(driver)
        return execute(context, stream)

    expected = drive(on_tensorrt(untabulated, FakeDriver()).create_window())
    monkeypatch.setattr(fake_tensorrt.Context, "execute_async_v3", enqueue)
    driver = FakeDriver()
    window = on_tensorrt(untabulated, driver).create_window()
    assert collected
    assert not any(collected)
    assert gc.isenabled()
    same(drive(window), expected)
    said = [m for m in caplog.messages if m.startswith("acting without CUDA graphs")]
    assert len(said) == bool(reason)
    assert all(reason in text for text in said)
    assert driver.books["graphs"] == 0 or not reason
    assert not any(stream.capture for stream in driver.streams.values())
    window.close()
    assert driver.books == NOTHING


def test_what_fails_is_raised_by_the_next_prediction(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the GPU, behind a queued step, and on every later call; or in a library."""
    run, broken = fake_tensorrt.Context.run, []

    def breaking(context: Any) -> None:
        if broken:
            context.module.driver.check_memory(0, 8)
        run(context)

    monkeypatch.setattr(fake_tensorrt.Context, "run", breaking)
    window = on_tensorrt(bundle, FakeDriver()).create_window()
    frames, states = zeros()
    broken.append("now")
    window.encode(frames, 1)
    for _ in range(2):
        with pytest.raises(BackendError, match="ILLEGAL_ADDRESS"):
            window.predict(states)
    broken.clear()
    monkeypatch.setenv(GRAPH_VARIABLE, "0")
    window = on_tensorrt(bundle, FakeDriver()).create_window()
    window._execution.stages["gpt"] = lambda: fail(FakeDriver())
    with pytest.raises(BackendError, match="RuntimeError: not while capturing"):
        window.predict(states)


# ONNX Runtime's CUDA provider, and signatures.


def test_what_the_exporter_writes_is_bound_once(bundle: Bundle, on_onnxruntime: Make) -> None:
    """However many windows there are."""
    backend = on_onnxruntime(bundle, FakeDriver())
    for _ in range(3):
        backend.create_window()
    for stage, session in zip(bundle.stages_to_load, Session.created, strict=True):
        names = [tensor.name for tensor in signature(bundle.manifest, stage).tensors]
        assert session.bound == names


def test_int8_is_refused(bundle: Bundle, on_onnxruntime: Make) -> None:
    """ONNX Runtime's optimiser computes such graphs wrongly on the CPU; nobody proved the GPU."""
    int8 = {
        name: msgspec.structs.replace(spec, precision="int8")
        for name, spec in bundle.manifest.stages.items()
    }
    manifest, driver = msgspec.structs.replace(bundle.manifest, stages=int8), FakeDriver()
    with pytest.raises(BackendError, match=r"INT8.*use TensorRT, the backend 'onnxruntime'"):
        on_onnxruntime(replace(bundle, manifest=manifest), driver)
    assert Session.created == []
    assert driver.retained == 0


def test_onnxruntime_without_its_cuda_graphs(
    bundle: Bundle, on_onnxruntime: Make, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Session, "uncapturable", True)
    driver = FakeDriver()
    backend = on_onnxruntime(bundle, driver)
    assert any("without CUDA graphs" in m and "cannot capture" in m for m in caplog.messages)
    assert driver.books["memory"] > 0
    backend.close()
    assert driver.books == NOTHING


@pytest.mark.parametrize(
    "changes", [{"shape": (1, 1, 1)}, {"shape": (1, 5, 2, 1)}, {"dtype": "uint8"}]
)
def test_a_graph_or_engine_with_another_signature(
    bundle: Bundle, make: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def other(manifest: Any, stage: Any) -> Signature:
        true = signature(manifest, stage)
        inputs = (t._replace(**changes) if t.name == "states" else t for t in true.inputs)
        return Signature(tuple(inputs), true.outputs)

    monkeypatch.setattr("vqbet_edge.runtime.backends.cuda_backend.signature", other)
    driver = FakeDriver()
    with pytest.raises(BackendError, match=r"gpt.*states.*expected"):
        make(bundle, driver)
    assert not {"states", "feature"} & {name for s in Session.created for name in s.bound}
    assert driver.books == NOTHING


def test_an_engine_of_a_type_that_numpy_lacks() -> None:
    """TensorRT's `nptype` raises for BF16 and FP8."""

    def nptype(_dtype: Any) -> Any:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")

    engine = SimpleNamespace(
        num_io_tensors=1,
        get_tensor_name=lambda _index: "x",
        get_tensor_dtype=lambda _name: "DataType.BF16",
        get_tensor_shape=lambda _name: (1,),
    )
    have = _tensors(SimpleNamespace(nptype=nptype), engine)
    with pytest.raises(BackendError, match=r"BF16.*expected"):
        check_signature("the engine", have, Signature((TensorSpec("x", "float32", (1,)),), ()))
