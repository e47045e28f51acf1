"""What TensorRT's builder logs of an engine that is built ahead of time: its final layers."""

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from vqbet_engines import worker
from vqbet_engines.builder import GRAPH, JOB, TIMING, Job

_LAYER = re.compile(r"^Name: .*?, LayerType: ([^,]+), Inputs: \[(.*?)\](?:, Constants|, Outputs)")


def builder_log(graph: bytes, job: Job) -> str:
    """Everything that TensorRT says while it builds."""
    said: list[str] = []

    def create_logger(tensorrt: Any, sink: Any) -> Any:
        return real(tensorrt, lambda level, text: (said.append(text), sink(level, text)))

    real = worker.create_logger
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(worker, "create_logger", create_logger),
    ):
        folder = Path(name)
        (folder / GRAPH).write_bytes(graph)
        (folder / JOB).write_bytes(msgspec.json.encode(job))
        (folder / TIMING).write_bytes(b"")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as the worker's `main` does
            worker.build(folder)
    return "\n".join(said)


def layer_inputs(log: str) -> list[tuple[str, set[str]]]:
    """Kind of every layer of the engine, and the types that it reads, constants not among them."""
    found = (_LAYER.match(line) for line in log.splitlines())
    return [(m[1], set(re.findall(r"Datatype: (\w+)", m[2]))) for m in found if m]
