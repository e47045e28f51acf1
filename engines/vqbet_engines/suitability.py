"""Whether a bundle's graphs suit a board's TensorRT, asked on a machine without that board."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.backends.tensorrt_module import FLAVOURS, import_tensorrt
from vqbet_edge.runtime.manifest import StageName
from vqbet_engines.boards import Board, jetpack_releases
from vqbet_engines.builder import build_plan
from vqbet_engines.messages import Job

# TensorRT for RTX builds for neither Orin (8.7) nor Thor (11.0): their next of kin.
_STAND_IN = {"8.6": "sm86", "8.7": "sm86", "8.9": "sm89", "11.0": "sm120", "12.0": "sm120"}


@dataclass(frozen=True)
class Suitability:
    """What was found.

    Attributes:
        problems: what the board's TensorRT will refuse, each with its stage; empty is good.
        notes: how far the check went.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_graphs(graphs: Mapping[StageName, bytes], board: Board) -> Suitability:
    """Check ONNX graphs against a board.

    The opset is compared with what the board's TensorRT takes; then TensorRT for RTX, where it is
    installed, parses and builds every graph strongly typed for the board's next of kin.

    Args:
        graphs: ONNX files by stage.
        board: from `load_board`.
    """
    releases = [release for release in jetpack_releases() if release.version in board.jetpack]
    problems, notes = [], []
    for stage, graph in graphs.items():
        opset = _opset(graph)
        refusing = [r.version for r in releases if opset > r.max_opset]
        if releases and len(refusing) == len(releases):
            problems.append(f"{stage}: opset {opset} is newer than any JetPack of {board.name}")
        elif refusing:
            notes.append(f"{stage}: opset {opset} is too new for JetPack {', '.join(refusing)}")
    try:
        import_tensorrt(FLAVOURS[1])
    except BackendError as error:
        notes.append(f"not built: {error}")
        return Suitability(tuple(problems), tuple(notes))
    target = _STAND_IN.get(board.compute_capability, "sm86")
    for stage, graph in graphs.items():
        failure = _failure(graph, BuildOptions(board.workspace_mb), target)
        if failure is not None:
            problems.append(f"{stage}: {failure}")
    notes.append(f"parsed and built for {target} by TensorRT for RTX, in place of {board.name}")
    return Suitability(tuple(problems), tuple(notes))


def _opset(graph: bytes) -> int:
    imports = onnx.load_from_string(graph).opset_import
    return int(max(entry.version for entry in imports if entry.domain == ""))


def _failure(graph: bytes, options: BuildOptions, target: str) -> str | None:
    try:
        build_plan(Job(graph, FLAVOURS[1], options, target, b""))
    except BackendError as error:
        return str(error)
    return None
