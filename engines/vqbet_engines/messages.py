"""What the builder's process is told and what it answers: MessagePack with a length in front.

A malformed graph can crash TensorRT's builder, so it runs in a process of its own.
"""

import struct
from typing import BinaryIO

import msgspec
from msgspec import Struct

from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.backends.tensorrt_module import Flavour

_LENGTH = struct.Struct("<Q")


class Job(Struct, frozen=True, tag=True):
    """A graph to build.

    Attributes:
        graph: the ONNX file.
        flavour: which TensorRT.
        options: how to build.
        compute_capability: "sm86" to build ahead of time for such a GPU, None for this machine's.
        timing_cache: what an earlier build returned, empty at first.
    """

    graph: bytes
    flavour: Flavour
    options: BuildOptions
    compute_capability: str | None
    timing_cache: bytes


class Progress(Struct, frozen=True, tag=True):
    """A phase of the build went on: `done` of `steps`, inside the phase `parent`."""

    phase: str
    parent: str | None
    steps: int
    done: int


class Notice(Struct, frozen=True, tag=True):
    """A line that the user should see."""

    text: str


class Failed(Struct, frozen=True, tag=True):
    """TensorRT refused; `text` names the node."""

    text: str


class Finished(Struct, frozen=True, tag=True):
    """The engine.

    Attributes:
        plan: the serialised engine.
        version: TensorRT's version.
        seconds: of parsing and building.
        layers: JSON of the engine inspector, or the layer list of the builder's log.
        timing_cache: for the next build; empty where TensorRT keeps none.
    """

    plan: bytes
    version: str
    seconds: float
    layers: str
    timing_cache: bytes


Message = Job | Progress | Notice | Failed | Finished


def send(stream: BinaryIO, message: Message) -> None:
    """Write one message."""
    data = msgspec.msgpack.encode(message)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Message | None:
    """Read one message; None when the other side has ended, even amid a message."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    data = stream.read(size)
    return msgspec.msgpack.decode(data, type=Message) if len(data) == size else None
