"""From the command's arguments to a report."""

import datetime as dt
import itertools
import math
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from vqbet_bench.arguments import Arguments
from vqbet_bench.machine import describe_machine, hottest
from vqbet_bench.observations import create_observations
from vqbet_bench.policies import Job
from vqbet_bench.results import FORMAT_VERSION, MODES, Report, Settings
from vqbet_bench.samples import SAMPLES_NEEDED
from vqbet_bench.session import Policies, Progress
from vqbet_bench.timing import RoundPlan
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.bundle import Bundle

# Enough predictions over all rounds to name the 90th percentile.
_MIN_REPLANS = SAMPLES_NEEDED[90.0]


def benchmark(arguments: Arguments, rate: float, progress: Progress) -> Report:
    """Measure everything that the arguments ask for, at `rate` steps a second where it is paced.

    Raises:
        VQBeTEdgeError: the bundles cannot be read or do not belong together.
    """
    bundles = {source: Bundle.open(source) for source in arguments.bundles}
    first, *others = bundles.values()
    for bundle in others:
        if bundle.manifest.input_features != first.manifest.input_features:
            raise UsageError(
                f"'{bundle.path}' observes other features than '{first.path}'; "
                "measure them one after the other"
            )
    progress("looking at the machine")
    machine = describe_machine()
    threads = arguments.threads or len(os.sched_getaffinity(0))
    jobs = _jobs(arguments, bundles, threads)
    with (
        TemporaryDirectory(prefix="vqbet-bench-") as folder,
        closing(Policies(Path(folder), progress)) as policies,
    ):
        for name, job in jobs.items():
            policies.start(name, job)
        found = policies.run(_plans(arguments, rate), arguments.rounds)
    facts = {**machine.facts, "hottest afterwards": hottest()}
    sizes = {
        str(bundle.path.absolute()): sum(spec.size for spec in bundle.manifest.files.values())
        for bundle in bundles.values()
    }
    return Report(
        format_version=FORMAT_VERSION,
        date=dt.datetime.now(dt.timezone.utc).isoformat(timespec="minutes"),
        machine=msgspec.structs.replace(machine, facts={k: v for k, v in facts.items() if v}),
        settings=Settings(
            rate=rate,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            threads=threads,
            observations=Path(arguments.dataset).name if arguments.dataset else "random, seeded",
        ),
        results=[
            msgspec.structs.replace(result, bundle_bytes=sizes.get(jobs[result.name].path))
            for result in found
        ],
        failures=policies.failures,
    )


def _jobs(arguments: Arguments, bundles: Mapping[str, Bundle], threads: int) -> dict[str, Job]:
    """LeRobot; every bundle on every backend, with every way of prefetching, recorded or not."""
    first = next(iter(bundles.values()))
    job = Job(
        kind="bundle",
        path="",
        observations=create_observations(first, arguments.dataset),
        chunk=first.manifest.policy.action_chunk_size,
        threads=threads,
    )
    found: dict[str, Job] = {}
    if arguments.checkpoint is not None:
        from vqbet_edge.training.checkpoint import locate_checkpoint  # noqa: PLC0415 - loads torch

        checkpoint = str(locate_checkpoint(arguments.checkpoint).absolute())
        found["LeRobot"] = replace(
            job, kind="lerobot", path=checkpoint, device=arguments.peer_device
        )
    choices = arguments.bundles, arguments.backend, arguments.prefetch or (None,)
    folders = dict.fromkeys((None, arguments.record))
    for source, backend, prefetch, record in itertools.product(*choices, folders):
        name, path = Path(source).name.removesuffix(".bundle"), bundles[source].path
        label = " ".join(filter(None, (name, backend, prefetch, record and "recorded")))
        if label in found:
            raise UsageError(
                f"two bundles are named '{name}'; rename one, or name each of them once"
            )
        one = replace(job, path=str(path.absolute()), backend=backend, prefetch=prefetch)
        found[label] = replace(one, record=record)
    return found


def _plans(arguments: Arguments, rate: float) -> list[RoundPlan]:
    seconds = arguments.seconds / arguments.rounds
    replans = math.ceil(_MIN_REPLANS / arguments.rounds)
    # Back to back, no disk takes what is recorded.
    modes = MODES if arguments.record is None else ("paced",)
    return [RoundPlan(mode, seconds, replans, rate) for mode in modes]
