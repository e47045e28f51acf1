"""Every backend's actions beside those of ONNX Runtime on the CPU (`bench/gpu.sh`).

python -m vqbet_bench.correctness BUNDLES --output result.json
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import tyro
from msgspec import Struct
from rich.console import Console

from vqbet_bench.contenders import create_edge_backend
from vqbet_bench.machine import describe_machine
from vqbet_bench.messages import EdgeBackend
from vqbet_bench.observations import Pool, create_pool
from vqbet_bench.results import Machine
from vqbet_edge.cli import run
from vqbet_edge.errors import VQBeTEdgeError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.policy import EdgePolicy


@dataclass(frozen=True)
class CorrectnessArguments:
    """Compare every backend's actions with the CPU's on the same observations."""

    # Bundles of one checkpoint, one per precision.
    bundles: tyro.conf.Positional[tuple[Path, ...]]
    # Where the report goes.
    output: Path
    # Backends to compare.
    backend: tuple[EdgeBackend, ...] = ("tensorrt", "tensorrt_rtx", "onnxruntime-cuda")
    # A LeRobot data set (folder or Hub id) to act on; random observations without.
    dataset: str | None = None


class Comparison(Struct, frozen=True):
    """A backend's chunks against the CPU backend's, codes forced to the CPU's greedy ones.

    Attributes:
        observations: how many.
        max_action_error: in the action's own units.
        mean_action_error: likewise.
        code_agreement: share of observations whose own greedy codes are the CPU's.
    """

    observations: int
    max_action_error: float
    mean_action_error: float
    code_agreement: float


class BackendResult(Struct, frozen=True):
    """One backend on one bundle."""

    backend: str
    bundle: str
    comparison: Comparison


class CorrectnessReport(Struct, frozen=True):
    """What `bench/gpu.sh` keeps."""

    machine: Machine
    results: list[BackendResult]
    not_compared: dict[str, str]


def compare(ours: EdgePolicy, cpu: EdgePolicy, pool: Pool) -> Comparison:
    """Drive both policies through the same observations, greedily."""
    errors, agreements = [], []
    for index in range(len(pool.states)):
        observation = pool.observation(index)
        expected = cpu.act_chunk(observation)
        if cpu.last is None:
            raise AssertionError("a policy that has acted has decided")
        codes = cpu.last.codes
        errors.append(np.abs(ours.act_chunk(observation, codes=codes) - expected))
        probabilities = ours.last.code_probabilities if ours.last else np.zeros((2, 1))
        agreements.append(np.array_equal(probabilities.argmax(axis=1), codes))
    return Comparison(
        observations=len(errors),
        max_action_error=float(np.max(errors)),
        mean_action_error=float(np.mean(errors)),
        code_agreement=float(np.mean(agreements)),
    )


def examine(name: EdgeBackend, bundle: Bundle, dataset: str | None) -> BackendResult:
    """One backend on one bundle.

    Raises:
        VQBeTEdgeError: the backend cannot be used here.
    """
    ours = EdgePolicy(bundle, create_edge_backend(name, bundle), temperature=0)
    cpu = EdgePolicy.load(bundle.path, "onnxruntime", temperature=0)
    comparison = compare(ours, cpu, create_pool(bundle, dataset))
    return BackendResult(name, bundle.path.name, comparison)


def write_report(arguments: CorrectnessArguments) -> None:
    """Compare everything and write the report; what cannot be compared says why."""
    console = Console(stderr=True)
    bundles = [Bundle.open(path) for path in arguments.bundles]
    results, missing = [], {}
    for bundle, name in itertools.product(bundles, arguments.backend):
        console.print(f"{name} on {bundle.path.name}")
        try:
            results.append(examine(name, bundle, arguments.dataset))
        except VQBeTEdgeError as error:
            missing[f"{name} on {bundle.path.name}"] = str(error)
            console.print(f"  not compared: {error}", markup=False)
    report = CorrectnessReport(describe_machine(), results, missing)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    arguments.output.write_bytes(text + b"\n")
    Console().print(f"written to {arguments.output}")


def main() -> None:
    """Entry point of `python -m vqbet_bench.correctness`."""
    arguments = tyro.cli(CorrectnessArguments, prog="python -m vqbet_bench.correctness")
    run(lambda: write_report(arguments))


if __name__ == "__main__":
    main()
