"""What the benchmark and its contenders' processes tell each other, one JSON line each."""

from typing import Literal

from msgspec import Struct

from vqbet_bench.results import Allocations, Memory, Mode, Round
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.backends.base import Idle

PeerName = Literal["lerobot", "lerobot-compile", "network", "single-graph"]
PEERS: tuple[PeerName, ...] = ("lerobot", "lerobot-compile", "network", "single-graph")
EdgeBackend = BackendName | Literal["tensorrt_rtx"]
ContenderKind = Literal["edge", "lerobot", "lerobot-compile", "network", "single-graph"]


class Job(Struct, frozen=True):
    """What a contender is.

    Attributes:
        kind: which implementation.
        path: bundle, checkpoint or ONNX file.
        pool: file of observations (`vqbet_bench.observations`).
        chunk: actions between two predictions.
        window: observations that the policy sees.
        threads: processors that the process may use.
        backend: of a bundle.
        idle: where a bundle's work ahead is done; None is the backend's default.
        device: "cpu" or "cuda", of a peer in PyTorch.
        started: monotonic clock when the process was started.
    """

    kind: ContenderKind
    path: str
    pool: str
    chunk: int
    window: int
    threads: int
    backend: EdgeBackend = "auto"
    idle: Idle | None = None
    device: str = "cpu"
    started: float = 0.0


class RoundCommand(Struct, frozen=True, tag=True):
    """Act for at least `seconds`, and until `min_replans` chunks were predicted."""

    mode: Mode
    seconds: float
    rate: float
    min_replans: int


class MemoryCommand(Struct, frozen=True, tag=True):
    """Report the memory."""


class AllocationsCommand(Struct, frozen=True, tag=True):
    """Count allocations over so many calls."""

    calls: int


class StagesCommand(Struct, frozen=True, tag=True):
    """Time each stage by itself, so many runs."""

    runs: int


Command = RoundCommand | MemoryCommand | AllocationsCommand | StagesCommand


class Ready(Struct, frozen=True, tag=True):
    """The first action is done."""

    start_up: float
    load: float
    details: dict[str, str]


class RoundReply(Struct, frozen=True, tag=True):
    """Of `RoundCommand`."""

    round: Round


class MemoryReply(Struct, frozen=True, tag=True):
    """Of `MemoryCommand`."""

    memory: Memory


class AllocationsReply(Struct, frozen=True, tag=True):
    """Of `AllocationsCommand`."""

    allocations: Allocations


class StagesReply(Struct, frozen=True, tag=True):
    """Of `StagesCommand`: stage -> samples."""

    stages: dict[str, list[float]]


class Failure(Struct, frozen=True, tag=True):
    """The contender cannot go on."""

    reason: str


Reply = Ready | RoundReply | MemoryReply | AllocationsReply | StagesReply | Failure
