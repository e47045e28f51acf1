"""The stages of a policy over one set of buffers on one stream of the GPU."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda_stream import Buffer, Launch, Stream
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.signatures import Signature, TensorSpec

#: Tensor name -> (NumPy's name of its type, shape), as a graph or an engine has them.
Tensors: TypeAlias = Mapping[str, tuple[str, tuple[int | str, ...]]]

# Lazy loading, autotuning and ONNX Runtime's own capture are over after this many runs.
_WARM_UP_RUNS = 3
# What leaves the encoder and what enters the GPT: the history lies between them, on the GPU.
_HISTORY_TENSORS = ("frame_tokens", "image_tokens")


class Execution:
    """The stages over one set of buffers, on one stream: one run at a time."""

    def __init__(self, expected: Mapping[StageName, Signature], stream: Stream) -> None:
        self.stream, self._lock = stream, threading.Lock()
        #: Whether the stream may still be reading the inputs of an earlier call.
        self.reading = False
        signatures = expected.values()
        self._tensors = tensors = {t.name: t for each in signatures for t in each.tensors}
        inputs = {tensor.name for each in signatures for tensor in each.inputs}
        outputs = {tensor.name for each in signatures for tensor in each.outputs}
        # What one stage leaves and no other takes, or the reverse, crosses to the host.
        crossing = (inputs ^ outputs) - set(_HISTORY_TENSORS)
        self.buffers = {
            name: stream.buffer(size_of(tensor), host=name in crossing)
            for name, tensor in tensors.items()
        }
        #: Where a tensor is read to that otherwise stays on the GPU, once somebody asked.
        self._read_into: dict[str, Buffer] = {}
        self.arrays = {name: view_of(self.buffers[name], tensors[name]) for name in crossing}
        #: Stage -> what puts one run of it on the stream.
        self.stages: dict[StageName, Launch] = {}
        stream.on_close(self.stages.clear)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Use it, in this thread and with the GPU's context."""
        with self._lock, self.stream.active():
            try:
                yield
            except BaseException:
                self.reading = True  # what was put on the stream before may still run
                raise

    def write(self, name: str, value: NDArray[Any]) -> None:
        """Fill an input, once nothing on the stream reads what is in it."""
        if self.reading:
            self.synchronize()
        np.copyto(self.arrays[name][0], value)

    def read(self, name: str) -> NDArray[Any]:
        """A copy of a tensor that stays on the GPU; the first time allocates."""
        size = size_of(self._tensors[name])
        if name not in self._read_into:
            self._read_into[name] = self.stream.buffer(size, host=True)
        buffer = self._read_into[name]
        self.stream.copy(buffer.address, self.buffers[name].address, size)
        self.stream.download(buffer)
        self.synchronize()
        latest: NDArray[Any] = view_of(buffer, self._tensors[name])[0].copy()
        return latest

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()
        self.reading = False

    def warm_up(self) -> None:
        """Run every stage on whatever its buffers hold."""
        for _ in range(_WARM_UP_RUNS):
            for stage in self.stages.values():
                stage()
            self.synchronize()


def check_signature(what: str, have: Tensors, expected: Signature) -> None:
    """Raise BackendError unless a graph's or an engine's own tensors are ours, before binding.

    With others it would read and write past our buffers.
    """
    need = {tensor.name: (tensor.dtype, tensor.shape) for tensor in expected.tensors}
    if have != need:
        raise BackendError(
            f"{what} has tensors {have}, expected {need}; export the checkpoint again"
        )


def size_of(tensor: TensorSpec) -> int:
    """Bytes of a tensor."""
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize


def view_of(buffer: Buffer, tensor: TensorSpec) -> NDArray[Any]:
    """A tensor's array over its page-locked buffer."""
    assert buffer.host is not None  # noqa: S101 - crossing tensors have a host side
    return buffer.host.view(tensor.dtype).reshape(tensor.shape)
