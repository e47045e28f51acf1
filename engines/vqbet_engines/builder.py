"""Building one engine in a process of its own: a malformed graph can crash TensorRT's builder.

The process (`worker`) reads files in a folder, leaves files there, and prints what it is doing:

    graph.onnx, job.json, timing.cache      what to build, and how
    plan, timing.cache, result.json         what was built; result.json comes last
    error.txt                               or why TensorRT refused
"""

import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.backends.tensorrt_module import Flavour

GRAPH, JOB, TIMING = "graph.onnx", "job.json", "timing.cache"
PLAN, RESULT, ERROR = "plan", "result.json", "error.txt"
# Marks what the worker prints; libraries print what they like, before it on the same line too.
PROGRESS = "vqbet-build: "
_LAST_LINES = 20  # of a worker that crashed, repeated in the error


class Job(Struct, frozen=True):
    """How to build.

    Attributes:
        flavour: which TensorRT.
        options: how.
        compute_capability: "sm86" to build ahead of time for such a GPU, None for this machine's.
    """

    flavour: Flavour
    options: BuildOptions = BuildOptions()
    compute_capability: str | None = None


@dataclass(frozen=True)
class Built:
    """An engine.

    Attributes:
        plan: the serialised engine.
        timing_cache: for the next build; empty where TensorRT keeps none.
        version: TensorRT's.
        seconds: of parsing and building.
    """

    plan: bytes
    timing_cache: bytes
    version: str
    seconds: float


def build_plan(
    graph: bytes,
    job: Job,
    timing_cache: bytes = b"",
    on_progress: Callable[[str], None] | None = None,
) -> Built:
    """Build an engine.

    Args:
        graph: the ONNX file.
        job: how to build it.
        timing_cache: what an earlier build returned.
        on_progress: called with what TensorRT is doing, in words.

    Raises:
        BackendError: TensorRT is missing, refuses the graph, or crashed on it.
    """
    with tempfile.TemporaryDirectory(prefix="vqbet-build-") as name:
        folder = Path(name)
        (folder / GRAPH).write_bytes(graph)
        (folder / JOB).write_bytes(msgspec.json.encode(job))
        (folder / TIMING).write_bytes(timing_cache)
        _run(folder, on_progress or (lambda _line: None))
        plan, timing_cache = (folder / PLAN).read_bytes(), (folder / TIMING).read_bytes()
        return Built(plan, timing_cache, **msgspec.json.decode((folder / RESULT).read_bytes()))


def _run(folder: Path, on_progress: Callable[[str], None]) -> None:
    phase, said = "its start", deque[str](maxlen=_LAST_LINES)
    with subprocess.Popen(  # noqa: S603
        module_command("vqbet_engines.worker", str(folder)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                noise, _, progress = line.strip().partition(PROGRESS)
                said.extend(filter(None, [noise]))
                if progress:
                    phase = progress
                    on_progress(progress)
            code = process.wait()
        finally:
            process.kill()
    if (folder / ERROR).exists():
        raise BackendError((folder / ERROR).read_text(encoding="utf-8"))
    # A crash after the last file is TensorRT's way of saying goodbye.
    if not (folder / RESULT).exists():
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        killed = code == -signal.SIGKILL
        hint = "; it ran out of memory: close programs or lower --workspace-mb" if killed else ""
        words = "\n".join([f"TensorRT's builder crashed ({how}) in '{phase}'{hint}", *said])
        raise BackendError(words.strip())
