"""Makes each checkpoint and bundle once per test session."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
from vqbet_export.exporter import ExportConfig, export

from vqbet_edge.runtime.manifest import Precision


@dataclass(frozen=True)
class Exported:
    """A LeRobot policy, its checkpoint, and a bundle made of it."""

    case: oracle.Case
    policy: Any
    checkpoint: Path
    bundle: Path
    precision: Precision


class Workshop:
    """Makes each checkpoint and bundle once per test session."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._policies: dict[str, Any] = {}
        self._bundles: dict[tuple[str, Precision], Exported] = {}

    def checkpoint(self, case: oracle.Case) -> tuple[Any, Path]:
        """A LeRobot policy and the directory it was saved to."""
        directory = self._root / case.name
        if case.name not in self._policies:
            with contextlib.redirect_stdout(io.StringIO()):
                policy = oracle.make_policy(case)
                oracle.save_checkpoint(policy, case, directory)
            self._policies[case.name] = policy
        return self._policies[case.name], directory

    def bundle(self, case: oracle.Case, precision: Precision = "fp32") -> Exported:
        """The bundle of a policy."""
        key = case.name, precision
        if key not in self._bundles:
            policy, directory = self.checkpoint(case)
            output = self._root / f"{case.name}-{precision}.bundle"
            export(ExportConfig(str(directory), output, precision, verify_steps=8))
            self._bundles[key] = Exported(case, policy, directory, output, precision)
        return self._bundles[key]
