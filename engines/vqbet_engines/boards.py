"""Board profiles (`engines/boards/*.toml`): what a board has and what software it runs."""

from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from vqbet_edge.errors import UsageError

# Beside the package in a wheel, one folder up in the repository.
_HERE = Path(__file__).parent
_ROOT = _HERE if (_HERE / "boards").is_dir() else _HERE.parent
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_MEMORY = Path("/proc/meminfo")

_T = TypeVar("_T")


class Board(Struct, frozen=True, forbid_unknown_fields=True):
    """A board. `sources` says for each figure where it is from.

    Attributes:
        name: in words.
        model: what its device tree's model contains; "x86" has none.
        super_mode: whether the figures are those of the power mode MAXN SUPER.
        compute_capability: of the GPU, such as "8.7".
        memory_gb: shared by processor and GPU on a Jetson.
        bandwidth_gb_s: of that memory, 10^9 bytes per second.
        tops: operations per second as advertised, 10^12.
        tops_kind: what `tops` counts.
        gpu_sms: streaming multiprocessors.
        gpu_mhz: highest clock.
        fp16_flops_per_sm_clock: dense, on tensor cores.
        dla_cores: deep-learning accelerators, which this package does not use.
        workspace_mb: MiB that TensorRT's builder may use.
        jetpack: releases that run on it, oldest first.
        sources: field -> source.
    """

    name: str
    model: str
    super_mode: bool
    compute_capability: str
    memory_gb: int
    bandwidth_gb_s: float
    tops: float
    tops_kind: str
    gpu_sms: int
    gpu_mhz: int
    fp16_flops_per_sm_clock: int
    dla_cores: int
    workspace_mb: int
    jetpack: tuple[str, ...]
    sources: dict[str, str]

    @property
    def fp16_tflops(self) -> float:
        """Dense FP16 operations per second of the GPU, 10^12: the roofline's flat part."""
        return self.gpu_sms * self.gpu_mhz * self.fp16_flops_per_sm_clock / 1e6

    def memory_bound_ms(self, weight_bytes: int) -> float:
        """Least time to read `weight_bytes` once, in milliseconds: the roofline's slope."""
        return weight_bytes / self.bandwidth_gb_s / 1e6


class JetPack(Struct, frozen=True, forbid_unknown_fields=True):
    """A JetPack release and the versions that it brings."""

    version: str
    l4t: str
    tensorrt: str
    cuda: str
    python: str
    max_opset: int


class _JetPacks(Struct, frozen=True, forbid_unknown_fields=True):
    release: tuple[JetPack, ...]


def board_names() -> tuple[str, ...]:
    """Names that `load_board` takes."""
    return tuple(sorted(path.stem for path in (_ROOT / "boards").glob("*.toml")))


def load_board(name: str) -> Board:
    """Read a board's profile.

    Raises:
        UsageError: there is no such board.
    """
    if name not in board_names():
        raise UsageError(f"unknown board '{name}'; use one of {', '.join(board_names())}")
    return _decode(_ROOT / "boards" / f"{name}.toml", Board)


def jetpack_releases() -> tuple[JetPack, ...]:
    """Every JetPack release that is known, oldest first."""
    return _decode(_ROOT / "jetpack.toml", _JetPacks).release


def detect_board() -> str | None:
    """Name of the board that this is, from its device tree; None when it is no known Jetson."""
    if not _DEVICE_TREE_MODEL.exists():
        return None
    kilobytes = int(_MEMORY.read_text().split("MemTotal:")[1].split()[0])
    return match_board(_DEVICE_TREE_MODEL.read_text().rstrip("\0\n"), kilobytes / 1e6)


def match_board(model: str, memory_gb: float) -> str | None:
    """The board whose model is named and whose memory is the least that holds `memory_gb`."""
    boards = {name: load_board(name) for name in board_names()}
    fitting = [
        (board.super_mode != ("Super" in model), board.memory_gb, name)
        for name, board in boards.items()
        if board.model in model and board.memory_gb * 1.1 >= memory_gb
    ]
    return min(fitting)[2] if fitting else None


def _decode(path: Path, kind: type[_T]) -> _T:
    return msgspec.toml.decode(path.read_bytes(), type=kind)
