"""Makes each checkpoint and bundle once per test session, whichever worker wants it first."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from environments import alone
from torch import nn
from vqbet_export import assembly, graph
from vqbet_export.exporter import ExportConfig, export

from vqbet_edge.runtime.manifest import Precision


def once(path: Path, make: Callable[[], object]) -> Path:
    """What is made at a path that all workers share; who comes second waits for it."""
    done = path.with_name(f"{path.name}.done")
    with alone(path):
        if not done.exists():
            make()
            done.touch()
    return path


_FLOAT = torch.Tensor.float


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """In float32 and without a word, also for a test that has put all of torch into float64.

    What is made for all must not depend on who wants it first.
    """
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(torch.Tensor, "float", _FLOAT)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def tracing_once(folder: Path) -> Iterator[None]:
    """Trace each graph once per session: most of an export's time, and many export one policy."""

    def export_graph(module: nn.Module, *signature: Any) -> bytes:
        plain = [
            {name: value for name, value in vars(part).items() if not name.startswith("_")}
            for part in module.modules()
        ]
        digest = hashlib.sha256(repr((type(module), signature, plain)).encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.detach().numpy().tobytes())
        path = folder / f"{digest.hexdigest()}.onnx"
        return once(
            path, lambda: path.write_bytes(graph.export_graph(module, *signature))
        ).read_bytes()

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "export_graph", export_graph)
        yield


@dataclass(frozen=True)
class Exported:
    """A LeRobot policy's checkpoint, and a bundle made of it."""

    case: oracle.Case
    checkpoint: Path
    bundle: Path


class Workshop:
    """Makes each checkpoint and bundle once per test session.

    Args:
        root: a folder that all workers share.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._policies: dict[str, Any] = {}

    def policy(self, case: oracle.Case) -> Any:
        """A LeRobot policy, the same for every worker."""
        if case.name not in self._policies:
            with plainly():
                self._policies[case.name] = oracle.make_policy(case)
        return self._policies[case.name]

    def checkpoint(self, case: oracle.Case) -> Path:
        """The directory that the policy was saved to."""
        directory = self._root / case.name
        with plainly():
            return once(
                directory, lambda: oracle.save_checkpoint(self.policy(case), case, directory)
            )

    def bundle(self, case: oracle.Case, precision: Precision = "fp32") -> Exported:
        """The bundle of a policy."""
        checkpoint = self.checkpoint(case)
        output = self._root / f"{case.name}-{precision}.bundle"
        config = ExportConfig(str(checkpoint), output, precision, verify_steps=8)
        with plainly():
            return Exported(case, checkpoint, once(output, lambda: export(config)))
