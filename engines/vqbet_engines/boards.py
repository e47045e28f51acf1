"""Board profiles (`engines/boards.toml`): what a board has and what software it runs."""

from functools import cache
from pathlib import Path

import msgspec
from msgspec import Struct

from vqbet_edge.errors import UsageError

# Beside the package in the repository, within it in a wheel.
_PLACES = Path(__file__).parents[1] / "boards.toml", Path(__file__).parent / "boards.toml"


class Board(Struct, frozen=True, forbid_unknown_fields=True):
    """A Jetson.

    Attributes:
        model: what its device tree's model contains.
        memory_gb: shared by processor and GPU.
        super_mode: whether the device tree's model says so.
    """

    model: str
    memory_gb: int
    super_mode: bool = False

    @property
    def workspace_mb(self) -> int:
        """MiB that TensorRT's builder may use: it shares the memory with the robot's programs."""
        return self.memory_gb * 1024 // 16


class JetPack(Struct, frozen=True, forbid_unknown_fields=True):
    """A JetPack release and the versions that it brings; `l4t` is how Jetson Linux's begins."""

    version: str
    l4t: tuple[str, ...]
    tensorrt: str
    cuda: str

    @property
    def supported(self) -> bool:
        """Whether its TensorRT takes the exporter's graphs: opset 20 needs TensorRT 10."""
        return int(self.tensorrt.split(".")[0]) >= 10


class Profiles(Struct, frozen=True, forbid_unknown_fields=True):
    """Boards by name, and JetPack releases, oldest first."""

    board: dict[str, Board]
    jetpack: tuple[JetPack, ...]


@cache
def profiles() -> Profiles:
    """The whole file."""
    path = next(path for path in _PLACES if path.exists())
    return msgspec.toml.decode(path.read_bytes(), type=Profiles)


def load_board(name: str) -> Board:
    """A board's profile.

    Raises:
        UsageError: there is no such board.
    """
    boards = profiles().board
    if name not in boards:
        raise UsageError(f"unknown board '{name}'; use one of {', '.join(sorted(boards))}")
    return boards[name]


def match_jetpack(l4t: str) -> JetPack | None:
    """The JetPack release that brings a version of Jetson Linux, such as "36.4.3"."""
    fitting = [
        (len(begin), release.version, release)
        for release in profiles().jetpack
        for begin in release.l4t
        if f"{l4t}.".startswith(f"{begin}.")
    ]
    return max(fitting)[-1] if fitting else None


def detect_board(root: Path = Path("/")) -> str | None:
    """Name of the board that this is, from its device tree; None when it is no known Jetson."""
    model, memory = root / "proc/device-tree/model", root / "proc/meminfo"
    if not model.exists():
        return None
    kilobytes = int(memory.read_text().split("MemTotal:")[1].split()[0])
    return match_board(model.read_text().rstrip("\0\n"), kilobytes / 1e6)


def match_board(model: str, memory_gb: float) -> str | None:
    """The board whose model is named and whose memory is the least that holds `memory_gb`."""
    fitting = [
        (board.super_mode != ("Super" in model), board.memory_gb, name)
        for name, board in profiles().board.items()
        if board.model in model and board.memory_gb * 1.1 >= memory_gb
    ]
    return min(fitting)[2] if fitting else None
