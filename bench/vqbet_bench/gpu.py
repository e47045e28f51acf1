"""Everything that needs a GPU: correctness and latency of every backend (`bench/gpu.sh`)."""

import importlib.util
import itertools
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import tyro
from msgspec import Struct
from rich.console import Console

from vqbet_bench.peers import Observation, attempt, lerobot_eager, network_compiled
from vqbet_bench.timing import Latency, measure
from vqbet_edge.backends import create_backend
from vqbet_edge.backends.base import Backend
from vqbet_edge.backends.cuda_backend import CudaBackend
from vqbet_edge.backends.tensorrt import TensorRTBackend
from vqbet_edge.backends.tensorrt_module import import_tensorrt
from vqbet_edge.bundle import Bundle
from vqbet_edge.commands import run
from vqbet_edge.data import LeRobotDataset
from vqbet_edge.errors import VQBeTEdgeError
from vqbet_edge.policy import EdgePolicy

BACKENDS: dict[str, Callable[[Bundle], Backend]] = {
    "tensorrt": lambda bundle: TensorRTBackend(bundle, tensorrt=import_tensorrt("tensorrt")),
    "tensorrt_rtx": lambda bundle: TensorRTBackend(
        bundle, tensorrt=import_tensorrt("tensorrt_rtx")
    ),
    "onnxruntime-cuda": lambda bundle: create_backend("onnxruntime-cuda", bundle),
    "onnxruntime": lambda bundle: create_backend("onnxruntime", bundle),
}


@dataclass(frozen=True)
class GpuArguments:
    """Compare every backend with the CPU's and time it beside PyTorch on this device."""

    # Bundles of one checkpoint, one per precision.
    bundles: tyro.conf.Positional[tuple[Path, ...]]

    # The checkpoint that they were exported from, for the peers in PyTorch.
    checkpoint: str

    # Where the report goes; its name says which GPU.
    output: Path

    # LeRobot data set whose frames are used.
    dataset: str = "tests/data/pusht"

    # Observations to compare actions on.
    observations: int = 200

    # Re-plans to time.
    runs: int = 1000

    # Device of the peers in PyTorch.
    device: Annotated[str, tyro.conf.arg(metavar="cuda|cpu")] = "cuda"


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


class Timings(Struct, frozen=True):
    """How fast a policy is on a backend.

    Attributes:
        critical_path: from observation to action on a re-planning step.
        queue_step: a step that returns a queued action, its frame encoded when it will be needed.
        stages: each stage alone; empty where a backend cannot tell.
    """

    critical_path: Latency
    queue_step: Latency
    stages: dict[str, Latency]


class BackendResult(Struct, frozen=True):
    """One backend on one bundle."""

    backend: str
    precision: str
    comparison: Comparison
    timings: Timings


class GpuReport(Struct, frozen=True):
    """What `bench/gpu.sh` commits."""

    machine: dict[str, str]
    results: list[BackendResult]
    peers: dict[str, Latency | str]
    not_measured: dict[str, str]


def load_observations(bundle: Bundle, source: str, count: int) -> list[Observation]:
    """The first `count` observations of a data set, episode by episode."""
    dataset, manifest = LeRobotDataset.open(source), bundle.manifest
    keys = [*manifest.image_keys, manifest.state_key]
    found: list[Observation] = []
    for position in range(dataset.num_episodes):
        episode = dataset.episode(position, keys)
        found += [{key: episode[key][row] for key in keys} for row in range(len(episode[keys[-1]]))]
        if len(found) >= count:
            break
    return found[:count]


def compare(ours: EdgePolicy, cpu: EdgePolicy, observations: list[Observation]) -> Comparison:
    """Drive both policies through the same observations, greedily."""
    errors, agreements = [], []
    for observation in observations:
        expected = cpu.act_chunk(observation)
        codes = _decided(cpu)
        chunk = ours.act_chunk(observation, codes=codes)
        errors.append(np.abs(chunk - expected))
        probabilities = ours.last.code_probabilities if ours.last else np.zeros((2, 1))
        agreements.append(np.array_equal(probabilities.argmax(axis=1), codes))
    return Comparison(
        observations=len(observations),
        max_action_error=float(np.max(errors)),
        mean_action_error=float(np.mean(errors)),
        code_agreement=float(np.mean(agreements)),
    )


def _decided(policy: EdgePolicy) -> Any:
    if policy.last is None:
        raise AssertionError("a policy that has acted has decided")
    return policy.last.codes


def time_backend(
    policy: EdgePolicy, backend: Backend, observations: list[Observation], runs: int
) -> Timings:
    """Time a policy on its backend."""
    frames = itertools.cycle(observations)

    def start_chunk() -> None:
        policy.reset()
        policy.act(next(frames))

    critical = measure(lambda: policy.act_chunk(next(frames)), runs, lambda: None)
    queued = measure(lambda: policy.act(next(frames)), runs, start_chunk)
    launches = backend.stage_launches() if isinstance(backend, CudaBackend) else {}
    stages = {str(name): measure(launch, runs, lambda: None) for name, launch in launches.items()}
    return Timings(critical, queued, stages)


def examine(name: str, bundle: Bundle, arguments: GpuArguments) -> BackendResult:
    """One backend on one bundle.

    Raises:
        VQBeTEdgeError: the backend cannot be used here.
    """
    backend = BACKENDS[name](bundle)
    observations = load_observations(bundle, arguments.dataset, arguments.observations)
    ours = EdgePolicy(bundle, backend, temperature=0)
    cpu = EdgePolicy.load(bundle.path, "onnxruntime", temperature=0)
    comparison = compare(ours, cpu, observations)
    timings = time_backend(ours, backend, observations, arguments.runs)
    return BackendResult(name, bundle.manifest.stages["gpt"].precision, comparison, timings)


def measure_peers(
    bundle: Bundle, arguments: GpuArguments, console: Console
) -> dict[str, Latency | str]:
    """The policy in PyTorch on the same device."""
    observation = load_observations(bundle, arguments.dataset, 1)[0]
    source, device, runs = arguments.checkpoint, arguments.device, arguments.runs // 4
    peers: dict[str, Callable[[], Latency]] = {
        "LeRobot eager": lambda: lerobot_eager(source, observation, device, runs, compiled=False),
        "LeRobot torch.compile": lambda: lerobot_eager(
            source, observation, device, runs, compiled=True
        ),
        "network torch.compile": lambda: network_compiled(source, observation, device, runs),
    }
    found = {}
    for name, call in peers.items():
        console.print(f"timing {name}")
        found[name] = attempt(call)
    return found


def describe_machine() -> dict[str, str]:
    """Software and GPU, as far as they tell."""
    machine = {"platform": platform.platform(), "python": platform.python_version()}
    for package in ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "numpy"):
        if importlib.util.find_spec(package) is not None:
            machine[package] = str(importlib.import_module(package).__version__)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
    if shutil.which(query[0]) is not None:
        done = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603
        machine["gpu"] = done.stdout.strip()
    return machine


def write_report(arguments: GpuArguments) -> None:
    """Measure everything and write the report; what cannot be measured says why."""
    console = Console(stderr=True)
    bundles = [Bundle.open(path) for path in arguments.bundles]
    results, missing = [], {}
    for bundle, name in itertools.product(bundles, BACKENDS):
        console.print(f"{name} on {bundle.path.name}")
        try:
            results.append(examine(name, bundle, arguments))
        except VQBeTEdgeError as error:
            missing[f"{name} on {bundle.path.name}"] = str(error)
            console.print(f"  not measured: {error}", markup=False)
    peers = measure_peers(bundles[0], arguments, console)
    report = GpuReport(describe_machine(), results, peers, missing)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    arguments.output.write_bytes(text + b"\n")
    Console().print(f"written to {arguments.output}")


def main() -> None:
    """Entry point of `python -m vqbet_bench.gpu`."""
    arguments = tyro.cli(GpuArguments, prog="python -m vqbet_bench.gpu")
    run(lambda: write_report(arguments))


if __name__ == "__main__":
    main()
