"""Building one engine in a process of its own."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import BinaryIO, cast

from vqbet_edge.errors import BackendError
from vqbet_engines.messages import Failed, Finished, Job, Notice, Progress, receive, send

OnEvent = Callable[[Progress | Notice], None]
_STDERR_TAIL = 2000  # bytes of the process's last words that an error repeats


def build_plan(job: Job, on_event: OnEvent | None = None) -> Finished:
    """Build an engine.

    Args:
        job: the graph and how to build it.
        on_event: called with progress and notices while TensorRT works, if at all.

    Raises:
        BackendError: TensorRT is missing, refuses the graph, or crashed on it.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "vqbet_engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            return _converse(process, job, on_event, stderr)
        finally:
            process.kill()
            process.communicate()


def _converse(
    process: "subprocess.Popen[bytes]", job: Job, on_event: OnEvent | None, stderr: BinaryIO
) -> Finished:
    phase = "its start"
    try:
        send(cast("BinaryIO", process.stdin), job)
    except BrokenPipeError:
        raise _crash(process, phase, stderr) from None
    while True:
        match receive(cast("BinaryIO", process.stdout)):
            case Finished() as finished:
                return finished
            case Failed(text):
                raise BackendError(text)
            case Progress() | Notice() as event:
                if on_event is not None:
                    on_event(event)
                phase = event.phase if isinstance(event, Progress) else phase
            case _:
                raise _crash(process, phase, stderr)


def _crash(process: "subprocess.Popen[bytes]", phase: str, stderr: BinaryIO) -> BackendError:
    code = process.wait()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    stderr.seek(max(0, stderr.seek(0, 2) - _STDERR_TAIL))
    words = stderr.read().decode(errors="replace").strip()
    hint = "; it ran out of memory: close programs or lower --workspace-mb" if code == -9 else ""
    return BackendError(f"TensorRT's builder crashed ({how}) in '{phase}'{hint}\n{words}".strip())
