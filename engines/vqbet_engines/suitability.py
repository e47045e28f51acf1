"""Whether a bundle's graphs suit a board's TensorRT, asked on a machine without that board."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt
from vqbet_edge.runtime.manifest import StageName
from vqbet_engines.boards import Board, jetpack_releases
from vqbet_engines.builder import Job, build_plan

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
    taken = [r.max_opset for r in jetpack_releases() if r.version in board.jetpack]
    problems = []
    for stage, graph in graphs.items():
        opset = _opset(graph)
        if taken and opset > max(taken):
            problems.append(f"{stage}: opset {opset} is newer than any JetPack of {board.name}")
    try:
        import_tensorrt("tensorrt_rtx")
    except BackendError as error:
        return Suitability(tuple(problems), (f"not built: {error}",))
    target = _STAND_IN.get(board.compute_capability, "sm86")
    job = Job("tensorrt_rtx", BuildOptions(board.workspace_mb), target)
    for stage, graph in graphs.items():
        try:
            build_plan(graph, job)
        except BackendError as error:  # noqa: PERF203 - four stages
            problems.append(f"{stage}: {error}")
    note = f"parsed and built for {target} by TensorRT for RTX, in place of {board.name}"
    return Suitability(tuple(problems), (note,))


def _opset(graph: bytes) -> int:
    imports = onnx.load_from_string(graph).opset_import
    return int(max(entry.version for entry in imports if entry.domain == ""))
