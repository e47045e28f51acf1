"""What `vqbet-bench` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vqbet_bench.policies import BundleBackend
from vqbet_edge.runtime.backends.base import Prefetch

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class Arguments:
    """Measure bundles on this machine: latency, stages, deadlines, memory, energy."""

    # Bundles: directories or Hub ids (user/name, user/name@revision).
    bundles: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE ...")]
    # Backends to run every bundle on.
    backend: tuple[BundleBackend, ...] = ("auto",)
    # When work is done ahead of the next prediction; the backend's default without.
    prefetch: tuple[Prefetch, ...] = ()
    # Steps a second of the robot's control loop; by default the demonstrations' as the first bundle
    # knows it, else 30.
    rate: float | None = None
    # Seconds per policy and way of running it.
    seconds: float = 10.0
    # Interleaved rounds that the seconds are spread over.
    rounds: int = 5
    # A LeRobot data set (folder or Hub id) or what `policy.record` wrote; random ones without.
    dataset: Annotated[str | None, tyro.conf.arg(metavar="DATASET")] = None
    # The checkpoint that the bundles were exported from, likewise: LeRobot is measured beside them.
    # Its own loader imports and runs what the processors name: trust it as a program.
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    # Where LeRobot runs.
    peer_device: Literal["cpu", "cuda"] = "cpu"
    # Processors that every policy may use; all by default.
    threads: int | None = None
    # Instead: so many robots at the same time on one vqbet-serve, beside a process for each.
    serve: tuple[int, ...] = ()
    # Instead: what recording decisions costs at the rate. Takes a folder on the disk in question;
    # what is written there is removed.
    record: Path | None = None
    # Print the result, every sample included, as JSON.
    json: Flag = False
    # Folder for result.json and report.md.
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
