"""What TensorRT's and ONNX Runtime's GPU backends share: history and launches.

Every tensor has one address for ever. The encoded frames stay on the GPU; frames and states go in,
logits and offsets come out. After loading nothing is allocated.
"""

import functools
import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.backends.base import (
    Backend,
    Floats,
    Frames,
    HeadOutputs,
    Intermediate,
    Window,
    foreign_errors,
)
from vqbet_edge.runtime.backends.cuda import Cuda, switch
from vqbet_edge.runtime.backends.cuda_execution import Execution, size_of
from vqbet_edge.runtime.backends.cuda_stream import Launch, Stream
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.signatures import signature

GRAPH_VARIABLE = "VQBET_EDGE_CUDA_GRAPH"
_LOG = logging.getLogger(__name__)
# ONNX Runtime captures such that no other thread may allocate on the GPU meanwhile.
_LOADING = threading.RLock()


class CudaBackend(Backend):
    """Stages on the GPU; subclasses load them and say where a window runs."""

    def __init__(self, bundle: Bundle, cuda: Cuda) -> None:
        super().__init__()
        self.capture = switch(GRAPH_VARIABLE, default=True)
        stages = bundle.stages_to_load
        self.signatures = {stage: signature(bundle.manifest, stage) for stage in stages}
        self._cuda = cuda
        with foreign_errors("loading the policy on the GPU"), _LOADING:
            self._stream = Stream(cuda)
            try:
                with self._stream.active():
                    self._load(bundle)
                # Loading includes the first window's warm-up: what fails there must fail here.
                self._ready = [CudaWindow(self, Stream(cuda))]
            except BaseException:
                self.close()
                raise

    @abstractmethod
    def _load(self, bundle: Bundle) -> None:
        """Load the stages; the context is the calling thread's."""

    @abstractmethod
    def execution(self, stream: Stream) -> Execution:
        """Where a window runs that has this stream: there, or where all windows do."""

    def create_window(self) -> "CudaWindow":
        """Buffers and history of a window, its launches captured."""
        self.check_open()
        with foreign_errors("creating a window on the GPU"), _LOADING:
            return self._ready.pop() if self._ready else CudaWindow(self, Stream(self._cuda))

    def _free(self) -> None:
        self._stream.close()


class CudaWindow(Window):
    """A robot's history on the GPU, in memory of the stream that is closed with it.

    `encode` returns while the GPU still works; what fails there is raised by the next prediction.
    """

    def __init__(self, backend: CudaBackend, stream: Stream) -> None:
        super().__init__(backend)
        self._stream, self._predicted = stream, False
        try:
            with stream.active():
                self._create(backend)
        except BaseException:
            self._free()
            backend.windows.discard(self)
            raise

    def _create(self, backend: CudaBackend) -> None:
        self._execution = backend.execution(self._stream)
        tokens = next(t for t in backend.signatures["gpt"].inputs if t.name == "image_tokens")
        self._length = tokens.shape[1]
        self._row_size = size_of(tokens) // self._length
        self._history = self._stream.buffer(size_of(tokens), host=False).address
        self._stream.synchronize()  # zeroed, whichever stream uses it next
        arrays = self._execution.arrays
        self._outputs = HeadOutputs(arrays["logits"][0].copy(), arrays["offsets"][0].copy())
        #: Launches that replay as CUDA graphs.
        self._graphs: dict[str, Launch] = {}
        if self._execution.stream is self._stream:
            self._capture(backend.capture)
        else:
            self._stream.on_close(self._execution.stream.settle)

    def _capture(self, wanted: bool) -> None:
        puts = {
            "encode": self._put_encode,
            "predict": self._put_predict,
            "replan": self._put_replan,
        }
        if "rvq_decoder" in self._execution.stages:  # else a table replaces it
            puts["rvq_decoder"] = self._put_decode
        self._execution.warm_up()
        if not wanted:
            return
        try:
            self._graphs = {name: self._stream.capture(put) for name, put in puts.items()}
            # The first launch of a graph uploads it; not while the robot moves.
            for launch in self._graphs.values():
                launch()
            self._stream.synchronize()
        except Exception as error:  # noqa: BLE001 - a library's, raised where it was to be captured
            self._graphs = {}
            self._execution.warm_up()  # what has spoiled more than the capture is raised here
            _LOG.warning("acting without CUDA graphs, which is slower: %s", error)

    def stage_launches(self) -> dict[StageName, Launch]:
        """One launch per stage that waits for its end: what benchmarks time."""
        puts = dict(self._execution.stages)
        if self._graphs:
            with self._execution.exclusive():
                puts = {name: self._stream.capture(put) for name, put in puts.items()}
        return {name: functools.partial(self._run, name, put) for name, put in puts.items()}

    def advance(self) -> None:
        """Move every row one step into the past, by way of the GPT's input."""
        size = self._row_size * (self._length - 1)
        if size:
            with self._using() as execution:
                scratch = execution.buffers["image_tokens"].address
                execution.stream.copy(scratch, self._row(1), size)
                execution.stream.copy(self._row(0), scratch, size)

    def fill(self) -> None:
        """Repeat the newest row."""
        newest = self._row(self._length - 1)
        with self._using() as execution:
            for row in range(self._length - 1):
                execution.stream.copy(self._row(row), newest, self._row_size)

    def encode(self, frames: Frames, row: int) -> None:
        """Put the encoding of frames (K, H, W, 3) into a row on the stream; do not wait for it."""
        self._forget_seconds(done=False)
        with self._using("encode") as execution:
            execution.write("frames", frames)
            self._graphs.get("encode", self._put_encode)()
            self._put_row(row)
            execution.reading = True

    def predict(self, states: Floats) -> HeadOutputs:
        """GPT and heads over the window, in one launch."""
        self._forget_seconds(done=True)
        with self._using("predict") as execution:
            if states.size:
                execution.write("states", states)
            self._graphs.get("predict", self._put_predict)()
            return self._finished(execution)

    def replan(self, frames: Frames, states: Floats, *, prefilled: bool) -> HeadOutputs:
        """Encoder, history, GPT and heads in one launch."""
        del prefilled
        self._forget_seconds(done=True)
        with self._using("replan") as execution:
            execution.write("frames", frames)
            if states.size:
                execution.write("states", states)
            self._graphs.get("replan", self._put_replan)()
            return self._finished(execution)

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """A code pair (2,) -> a chunk (W, A) by the RVQ decoder's graph."""
        with self._using("rvq_decoder") as execution:
            execution.write("codes", codes)
            self._graphs.get("rvq_decoder", self._put_decode)()
            execution.synchronize()
            decoded: Floats = execution.arrays["decoded"][0].copy()
            return decoded

    def read(self, tensor: Intermediate) -> Floats:
        """What the latest prediction left on the GPU between two stages."""
        with self._using() as execution:
            latest: Floats = execution.read(tensor)
            return latest

    def _finished(self, execution: Execution) -> HeadOutputs:
        """Copies, because other windows may run in the same buffers."""
        execution.synchronize()
        for name, mine in self._outputs._asdict().items():
            np.copyto(mine, execution.arrays[name][0])
        return self._outputs

    def _run(self, name: str, put: Launch) -> None:
        with self._using(name) as execution:
            put()
            execution.synchronize()

    @contextmanager
    def _using(self, name: str | None = None) -> Iterator[Execution]:
        start = time.perf_counter()
        self.check_open()
        with foreign_errors("running the policy on the GPU"), self._execution.exclusive():
            yield self._execution
        if name is not None:
            self.seconds[name] = time.perf_counter() - start

    def _forget_seconds(self, *, done: bool) -> None:
        """Drop the previous prediction's; `done` when this call makes the next one."""
        if self._predicted:
            self.seconds.clear()
        self._predicted = done

    def _put_encode(self) -> None:
        self._execution.stream.upload(self._execution.buffers["frames"])
        self._execution.stages["vision_encoder"]()

    def _put_row(self, row: int) -> None:
        tokens = self._execution.buffers["frame_tokens"].address
        self._execution.stream.copy(self._row(row), tokens, self._row_size)

    def _put_predict(self) -> None:
        stream, buffers = self._execution.stream, self._execution.buffers
        size = self._length * self._row_size
        stream.copy(buffers["image_tokens"].address, self._history, size)
        if "states" in buffers:
            stream.upload(buffers["states"])
        self._execution.stages["gpt"]()
        self._execution.stages["code_heads"]()
        stream.download(buffers["logits"])
        stream.download(buffers["offsets"])

    def _put_replan(self) -> None:
        self._put_encode()
        self._put_row(self._length - 1)
        self._put_predict()

    def _put_decode(self) -> None:
        stream, buffers = self._execution.stream, self._execution.buffers
        stream.upload(buffers["codes"])
        self._execution.stages["rvq_decoder"]()
        stream.download(buffers["decoded"])

    def _row(self, row: int) -> int:
        """Its address."""
        return self._history + row * self._row_size

    def _free(self) -> None:
        self._stream.close()
