"""Building one engine in a process of its own."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.child import module_command
from vqbet_engines.messages import Failed, Finished, Job, Notice, Progress, receive, send

OnEvent = Callable[[Progress | Notice], None]
_OUTPUT_TAIL = 2000  # bytes of the process's last words that an error repeats


def build_plan(job: Job, on_event: OnEvent | None = None) -> Finished:
    """Build an engine.

    Args:
        job: the graph and how to build it.
        on_event: called with progress and notices while TensorRT works, if at all.

    Raises:
        BackendError: TensorRT is missing, refuses the graph, or crashed on it.
    """
    # Answers have a pipe of their own: libraries print to standard output as they like.
    answers, worker_end = os.pipe()
    with tempfile.TemporaryFile() as output, open(answers, "rb") as stream:  # noqa: PTH123
        process = subprocess.Popen(  # noqa: S603
            module_command("vqbet_engines.worker", str(worker_end)),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(worker_end,),
        )
        os.close(worker_end)
        try:
            return _converse(_Worker(process, stream, output), job, on_event)
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True)
class _Worker:
    process: "subprocess.Popen[bytes]"
    answers: BinaryIO
    output: BinaryIO


def _converse(worker: _Worker, job: Job, on_event: OnEvent | None) -> Finished:
    phase = "its start"
    with contextlib.suppress(BrokenPipeError):  # it has crashed, as reading will show
        send(cast("BinaryIO", worker.process.stdin), job)
    while True:
        match receive(worker.answers):
            case Finished() as finished:
                return finished
            case Failed(text):
                raise BackendError(text)
            case Progress() | Notice() as event:
                if on_event is not None:
                    on_event(event)
                phase = event.phase if isinstance(event, Progress) else phase
            case _:
                raise _crash(worker, phase)


def _crash(worker: _Worker, phase: str) -> BackendError:
    code = worker.process.wait()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    worker.output.seek(max(0, worker.output.seek(0, 2) - _OUTPUT_TAIL))
    words = worker.output.read().decode(errors="replace").strip()
    hint = "; it ran out of memory: close programs or lower --workspace-mb" if code == -9 else ""
    return BackendError(f"TensorRT's builder crashed ({how}) in '{phase}'{hint}\n{words}".strip())
