"""How long steps take, each beside LeRobot's in the same interleaved run. Nothing is asserted.

pytest-benchmark times the very policies that `vqbet-bench` times; `extra_info` says how many times
faster than LeRobot they were where all of them took turns. Compare two commits by those ratios:

    make bench PYTEST_ARGS=--benchmark-save=before
    make bench PYTEST_ARGS=--benchmark-compare

`VQBET_BENCH_CHECKPOINT` names a checkpoint to use; without it an untrained policy of LeRobot's
default sizes on PushT's features stands in, which takes as long as a trained one.
`VQBET_BENCH_SECONDS` is how long each policy acts in each way (10).
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
from vqbet_bench.arguments import Arguments
from vqbet_bench.benchmark import benchmark as compare
from vqbet_bench.observations import create_observations
from vqbet_bench.policies import Job, Policy, load_policy
from vqbet_bench.results import MODES, Report, Result
from vqbet_export.exporter import ExportConfig, export
from workshop import Workshop

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Precision

ROUNDS = 5
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
POLICIES = ("lerobot", *PRECISIONS)
WARM_UP_STEPS = 50


@dataclass(frozen=True)
class Compared:
    """LeRobot and the bundles of its checkpoint, measured in one interleaved run."""

    checkpoint: Path
    bundles: dict[str, Path]
    report: Report


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    root = tmp_path_factory.mktemp("bench")
    workshop = Workshop(root)
    case = oracle.Case("default", fields={"use_group_norm": False})
    given = os.environ.get("VQBET_BENCH_CHECKPOINT")
    checkpoint = Path(given) if given else workshop.checkpoint(case)
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
    )
    return Compared(checkpoint, bundles, compare(arguments, lambda _: None))


def load(compared: Compared, policy: str) -> Policy:
    bundle = Bundle.open(compared.bundles["fp32"])
    spec = bundle.manifest.policy
    job = Job(
        kind="lerobot" if policy == "lerobot" else "bundle",
        path=str(compared.checkpoint if policy == "lerobot" else compared.bundles[policy]),
        observations=create_observations(bundle, None),
        chunk=spec.action_chunk_size,
        window=spec.n_obs_steps,
        threads=compared.report.settings.threads,
        backend="onnxruntime",
    )
    return load_policy(job)


def result(compared: Compared, policy: str) -> Result:
    found = [r for r in compared.report.results if policy in {r.kind, r.name.split()[0]}]
    assert found, compared.report.failures
    return found[0]


def ratios(compared: Compared, policy: str) -> dict[str, float]:
    """LeRobot's median over the rounds by the policy's, in every mode."""
    ours, base = result(compared, policy), result(compared, "lerobot")
    found = {}
    for mode, figure in itertools.product(MODES, ("p50", "worst")):
        theirs = base.median_over_rounds(mode, figure)  # type: ignore[arg-type]
        seconds = ours.median_over_rounds(mode, figure)  # type: ignore[arg-type]
        if theirs and seconds:
            found[f"times faster than LeRobot, {mode}, {figure}"] = round(theirs / seconds, 2)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("step", ["replan", "queue", "every"])
def test_step(benchmark: Any, compared: Compared, policy: str, step: str) -> None:
    """`replan` and `queue` in a loop of whole chunks, `every` with a prediction in every step."""
    acting = load(compared, policy)
    acting.start(every=step == "every")
    steps = itertools.count()

    def advance(count: int) -> None:
        for _ in range(count):
            acting.act(acting.prepare(next(steps)))

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        """Outside the clock: go to the next step of the wanted kind."""
        if step != "every":
            wanted = 0 if step == "replan" else 1
            position = next(steps)
            while position % acting.chunk != wanted:
                acting.act(acting.prepare(position))
                position = next(steps)
        else:
            position = next(steps)
        return (acting.prepare(position),), {}

    advance(WARM_UP_STEPS)
    benchmark.group = step
    benchmark.extra_info.update(ratios(compared, policy))
    benchmark.pedantic(acting.act, setup=setup, rounds=100)


@pytest.mark.parametrize("policy", POLICIES)
def test_start_up(benchmark: Any, compared: Compared, policy: str) -> None:
    """Loading and the first action, the library imported already."""
    measured = result(compared, policy)
    benchmark.extra_info["fresh process to first action, s"] = round(measured.start_up, 3)
    benchmark.extra_info["resident MB"] = round(measured.memory.resident / 1e6, 1)

    def start() -> None:
        acting = load(compared, policy)
        acting.act(acting.prepare(0))

    benchmark.pedantic(start, rounds=3)
