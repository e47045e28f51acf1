"""What the benchmark suites share: one default policy, LeRobot's and ours, measured side by side.

`VQBET_BENCH_CHECKPOINT` names a checkpoint to use; without it an untrained policy of LeRobot's
default sizes on PushT's features stands in, which takes as long as a trained one.
`VQBET_BENCH_SECONDS` is how long each policy acts in each way (10).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
from vqbet_bench.benchmark import benchmark
from vqbet_bench.cli import Arguments
from vqbet_bench.results import Report
from vqbet_export.exporter import ExportConfig, export
from workshop import Workshop

ROUNDS = 5
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class Compared:
    """LeRobot and the bundles of its checkpoint, measured in one interleaved run."""

    checkpoint: Path
    bundles: dict[str, Path]
    report: Report


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Measured once, before the suites."""
    root = tmp_path_factory.mktemp("bench")
    workshop = Workshop(root)
    case = oracle.Case("default", fields={"use_group_norm": False})
    given = os.environ.get("VQBET_BENCH_CHECKPOINT")
    checkpoint = Path(given) if given else workshop.checkpoint(case)[1]
    bundles = {p: root / f"{p}.bundle" for p in PRECISIONS}
    for precision, bundle in bundles.items():
        export(ExportConfig(str(checkpoint), bundle, precision, verify_steps=8))
    arguments = Arguments(
        bundles=tuple(bundles.values()),
        backend=("onnxruntime",),
        checkpoint=checkpoint,
        peers=("lerobot",),
        seconds=float(os.environ.get("VQBET_BENCH_SECONDS", "10")),
        rounds=ROUNDS,
        allocation_calls=0,
    )
    return Compared(checkpoint, bundles, benchmark(arguments, lambda _: None))
