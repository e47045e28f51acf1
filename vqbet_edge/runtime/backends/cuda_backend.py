"""What TensorRT's and ONNX Runtime's GPU backends share: buffers, window, launches.

Every tensor has one address for ever. The window of encoded frames stays on the GPU; frames and
states go in, logits and offsets come out. After loading nothing is allocated.
"""

import functools
import time
from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import BackendError, BundleError
from vqbet_edge.runtime.backends.base import Backend, Floats, Frames, HeadOutputs, Window
from vqbet_edge.runtime.backends.cuda import GRAPH_VARIABLE, Buffer, Cuda, Launch, switch
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName, StageSpec
from vqbet_edge.runtime.signatures import TensorSpec

#: Tensor name -> (NumPy's name of its type, shape).
Borders = dict[str, tuple[str, tuple[int | str, ...]]]

# Lazy loading, autotuning and ONNX Runtime's own capture are over after this many runs.
_WARM_UP_RUNS = 3
# These two are the window: what leaves the encoder enters the GPT without leaving the GPU.
_WINDOW_TENSORS = ("frame_tokens", "image_tokens")


class CudaBackend(Backend):
    """Stages on one stream; subclasses say how one stage is put on it.

    Args:
        bundle: the verified bundle.
        cuda: the device.
        capture: replay launches as CUDA graphs, unless $VQBET_EDGE_CUDA_GRAPH is 0.
    """

    def __init__(self, bundle: Bundle, cuda: Cuda, *, capture: bool) -> None:
        super().__init__()
        self._cuda, self._predicted = cuda, False
        self._graph_wanted = switch(GRAPH_VARIABLE, default=True)
        specs = [bundle.manifest.stages[stage] for stage in bundle.stages_to_load]
        tensors = _tensors(specs)
        inputs = {tensor.name for spec in specs for tensor in spec.inputs}
        outputs = {tensor.name for spec in specs for tensor in spec.outputs}
        # What one stage leaves and no other takes, or the reverse, crosses to the host.
        crossing = (inputs ^ outputs) - set(_WINDOW_TENSORS)
        self._buffers = {
            name: cuda.buffer(_size(tensor), host=name in crossing)
            for name, tensor in tensors.items()
        }
        self._arrays = {name: _view(self._buffers[name], tensors[name]) for name in crossing}
        self._outputs = HeadOutputs(self._arrays["logits"], self._arrays["offsets"])
        self._batch, self._length = tensors["image_tokens"].shape[:2]
        self._row_size = _size(tensors["image_tokens"]) // (self._batch * self._length)
        self._scratch = cuda.buffer(max(1, self._row_size * (self._length - 1)), host=False)
        self._stages = {stage: self._create_stage(bundle, stage) for stage in bundle.stages_to_load}
        self._launches = self._prepare(capture and self._graph_wanted)

    def create_window(self) -> Window:
        """Not divided into weights and windows yet."""
        raise BackendError("the CUDA backends are being divided into weights and windows")

    @abstractmethod
    def _create_stage(self, bundle: Bundle, stage: StageName) -> Launch:
        """Load a stage over `self._buffers`; the result puts one run of it on the stream."""

    def _prepare(self, capture: bool) -> dict[str, Launch]:
        launches = {"replan": self._put_replan, "predict": self._put_predict}
        if "rvq_decoder" in self._stages:  # else a table replaces it
            launches["rvq_decoder"] = self._put_decode
        for _ in range(_WARM_UP_RUNS):
            for put in launches.values():
                put()
            self._cuda.synchronize()
        if not capture:
            return launches
        return {name: self._cuda.capture(put) for name, put in launches.items()}

    def stage_launches(self) -> dict[StageName, Launch]:
        """One launch per stage that waits for its end: what benchmarks time."""
        capture = self._launches["replan"] != self._put_replan
        puts = {n: self._cuda.capture(s) if capture else s for n, s in self._stages.items()}
        return {name: functools.partial(self._run, name, put) for name, put in puts.items()}

    def advance(self) -> None:
        """Move every row one step into the past, by way of a scratch buffer."""
        self._cuda.make_current()
        size = self._row_size * (self._length - 1)
        for batch in range(self._batch if size else 0):
            self._cuda.copy(self._scratch.address, self._row(batch, 1), size)
            self._cuda.copy(self._row(batch, 0), self._scratch.address, size)

    def fill(self) -> None:
        """Repeat the newest row."""
        self._cuda.make_current()
        for batch in range(self._batch):
            newest = self._row(batch, self._length - 1)
            for row in range(self._length - 1):
                self._cuda.copy(self._row(batch, row), newest, self._row_size)

    def encode(self, frames: Frames, row: int) -> None:
        """Encode frames (B, K, H, W, 3) into a row."""
        self._forget_seconds(done=False)
        np.copyto(self._arrays["frames"], frames)
        self._run("encode", lambda: self._put_encode(row))

    def predict(self, states: Floats) -> HeadOutputs:
        """GPT and heads over the window, in one launch."""
        self._forget_seconds(done=True)
        np.copyto(self._arrays["states"], states)
        self._run("predict", self._launches["predict"])
        return self._outputs

    def replan(self, frames: Frames, states: Floats, *, prefilled: bool) -> HeadOutputs:
        """Encoder, window, GPT and heads in one launch."""
        del prefilled
        self._forget_seconds(done=True)
        np.copyto(self._arrays["frames"], frames)
        np.copyto(self._arrays["states"], states)
        self._run("replan", self._launches["replan"])
        return self._outputs

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """Code pairs -> chunks by the RVQ decoder's graph."""
        np.copyto(self._arrays["codes"], codes)
        self._run("rvq_decoder", self._launches["rvq_decoder"])
        decoded: Floats = self._arrays["decoded"]
        return decoded

    def _run(self, name: str, launch: Launch) -> None:
        start = time.perf_counter()
        self._cuda.make_current()
        launch()
        self._cuda.synchronize()
        self.seconds[name] = time.perf_counter() - start

    def _forget_seconds(self, *, done: bool) -> None:
        """Drop the previous prediction's; `done` when this call makes the next one."""
        if self._predicted:
            self.seconds.clear()
        self._predicted = done

    def _put_encode(self, row: int) -> None:
        self._cuda.upload(self._buffers["frames"])
        self._stages["vision_encoder"]()
        tokens = self._buffers["frame_tokens"].address
        for batch in range(self._batch):
            source = tokens + batch * self._row_size
            self._cuda.copy(self._row(batch, row), source, self._row_size)

    def _put_predict(self) -> None:
        self._cuda.upload(self._buffers["states"])
        self._stages["gpt"]()
        self._stages["code_heads"]()
        self._cuda.download(self._buffers["logits"])
        self._cuda.download(self._buffers["offsets"])

    def _put_replan(self) -> None:
        self._put_encode(self._length - 1)
        self._put_predict()

    def _put_decode(self) -> None:
        self._cuda.upload(self._buffers["codes"])
        self._stages["rvq_decoder"]()
        self._cuda.download(self._buffers["decoded"])

    def _row(self, batch: int, row: int) -> int:
        """Address of a row of the window."""
        window = self._buffers["image_tokens"].address
        return window + (batch * self._length + row) * self._row_size


def check_borders(what: str, have: Borders, spec: StageSpec) -> None:
    """Compare a graph's or an engine's own tensors with the manifest's, before they are bound.

    With others it would read and write past our buffers.

    Raises:
        BackendError: they differ.
    """
    need = {t.name: (t.dtype, t.shape) for t in (*spec.inputs, *spec.outputs)}
    if have != need:
        raise BackendError(
            f"{what} has tensors {have}, expected {need}; export the checkpoint again"
        )


def _tensors(specs: list[StageSpec]) -> dict[str, TensorSpec]:
    """Every tensor by its name, under which it has one buffer."""
    tensors: dict[str, TensorSpec] = {}
    for tensor in (t for spec in specs for t in (*spec.inputs, *spec.outputs)):
        other = tensors.setdefault(tensor.name, tensor)
        if other != tensor:
            raise BundleError(
                f"the manifest's stages disagree on '{tensor.name}': expected {other.dtype} "
                f"{other.shape}, got {tensor.dtype} {tensor.shape}; export the checkpoint again"
            )
    return tensors


def _size(tensor: TensorSpec) -> int:
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize


def _view(buffer: Buffer, tensor: TensorSpec) -> NDArray[Any]:
    assert buffer.host is not None  # noqa: S101 - crossing tensors have a host side
    return buffer.host.view(tensor.dtype).reshape(tensor.shape)
