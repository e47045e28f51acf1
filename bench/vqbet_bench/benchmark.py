"""From the command's arguments to a report."""

import datetime as dt
import itertools
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from vqbet_bench.arguments import Arguments
from vqbet_bench.machine import describe_machine, hottest
from vqbet_bench.observations import Observations, create_observations
from vqbet_bench.policies import Job, PeerName
from vqbet_bench.results import FORMAT_VERSION, MODES, Report, Result, Settings
from vqbet_bench.samples import SAMPLES_NEEDED
from vqbet_bench.session import Progress, Session
from vqbet_bench.timing import RoundPlan
from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.bundle import Bundle

_PEER_NAMES: dict[PeerName, str] = {"lerobot": "LeRobot", "single-graph": "single ONNX graph"}
# Enough predictions over all rounds to name the 90th percentile.
_MIN_REPLANS = SAMPLES_NEEDED[90.0]


def benchmark(arguments: Arguments, progress: Progress) -> Report:
    """Measure everything that the arguments ask for.

    Raises:
        VQBeTEdgeError: the bundles cannot be read or do not belong together.
    """
    named = {source: Bundle.open(source) for source in arguments.bundles}
    bundles = {str(bundle.path.absolute()): bundle for bundle in named.values()}
    first = _checked(bundles)
    progress("looking at the machine")
    machine = describe_machine()
    job = _job(first, create_observations(first, arguments.dataset), arguments)
    jobs = _bundle_jobs(arguments, named, job)
    with TemporaryDirectory(prefix="vqbet-bench-") as name:
        folder = Path(name)
        with closing(Session(folder, progress)) as session:
            for peer, peer_job in _peer_jobs(arguments, job, folder, session.failures, progress):
                session.start(peer, peer_job)
            for label, bundle_job in jobs.items():
                session.start(label, bundle_job)
            found = session.run(_plans(arguments), arguments.rounds)
            failures = session.failures
    facts = {**machine.facts, "hottest afterwards": hottest()}
    results = [
        _with_size(result, bundles[jobs[result.name].path]) if result.kind == "bundle" else result
        for result in found
    ]
    return Report(
        format_version=FORMAT_VERSION,
        date=dt.datetime.now(dt.timezone.utc).isoformat(timespec="minutes"),
        machine=msgspec.structs.replace(machine, facts={k: v for k, v in facts.items() if v}),
        settings=_settings(arguments, job.threads),
        results=results,
        failures=failures,
    )


def _checked(bundles: Mapping[str, Bundle]) -> Bundle:
    """The first bundle, whose observations all of them take."""
    first, *others = bundles.values()
    for bundle in others:
        if bundle.manifest.input_features != first.manifest.input_features:
            raise UsageError(
                f"'{bundle.path}' observes other features than '{first.path}'; "
                "measure them one after the other"
            )
    return first


def _job(bundle: Bundle, observations: Observations, arguments: Arguments) -> Job:
    """What all jobs have in common."""
    policy = bundle.manifest.policy
    return Job(
        kind="bundle",
        path="",
        observations=observations,
        chunk=policy.action_chunk_size,
        window=policy.n_obs_steps,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
    )


def _bundle_jobs(arguments: Arguments, bundles: Mapping[str, Bundle], job: Job) -> dict[str, Job]:
    """Every bundle on every backend, with every way of prefetching, unrecorded and recorded."""
    found: dict[str, Job] = {}
    choices = arguments.bundles, arguments.backend, arguments.prefetch or (None,)
    folders = dict.fromkeys((None, arguments.record))
    for source, backend, prefetch, record in itertools.product(*choices, folders):
        name, path = Path(source).name.removesuffix(".bundle"), bundles[source].path
        words = name, backend, prefetch, record and "recorded"
        label = " ".join(filter(None, words))
        if label in found:
            raise UsageError(
                f"two bundles are named '{name}'; rename one, or name each of them once"
            )
        one = replace(job, path=str(path.absolute()), backend=backend, prefetch=prefetch)
        found[label] = replace(one, record=record)
    return found


def _peer_jobs(
    arguments: Arguments, job: Job, folder: Path, failures: dict[str, str], progress: Progress
) -> Iterator[tuple[str, Job]]:
    if arguments.checkpoint is None:
        return
    from vqbet_edge.training.checkpoint import locate_checkpoint  # noqa: PLC0415 - loads torch

    checkpoint = str(locate_checkpoint(arguments.checkpoint).absolute())
    for kind in arguments.peers:
        name, path = _PEER_NAMES[kind], checkpoint
        if kind == "single-graph":
            progress(f"exporting the {name}")
            path = str(folder / "single.onnx")
            try:
                _run_alone("vqbet_bench.whole_policy", checkpoint, path)
            except VQBeTEdgeError as error:
                failures[name] = str(error)
                continue
        yield name, replace(job, kind=kind, path=path, device=arguments.peer_device)


def _run_alone(module: str, *arguments: str) -> None:
    """A module's `main` in a process of its own, so that what it loads is in nobody's memory.

    Raises:
        VQBeTEdgeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        module_command(module, *arguments), env=environment, capture_output=True, check=False
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace")[-1000:].strip()
        raise VQBeTEdgeError(f"{module} ended with exit code {done.returncode}: {words}")


def _plans(arguments: Arguments) -> list[RoundPlan]:
    seconds = arguments.seconds / arguments.rounds
    replans = math.ceil(_MIN_REPLANS / arguments.rounds)
    # Back to back, no disk takes what is recorded.
    modes = MODES if arguments.record is None else ("paced",)
    return [RoundPlan(mode, seconds, replans, arguments.steps_a_second) for mode in modes]


def _settings(arguments: Arguments, threads: int) -> Settings:
    return Settings(
        rate=arguments.steps_a_second,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        threads=threads,
        observations=Path(arguments.dataset).name if arguments.dataset else "random, seeded",
    )


def _with_size(result: Result, bundle: Bundle) -> Result:
    size = sum(spec.size for spec in bundle.manifest.files.values())
    return msgspec.structs.replace(result, bundle_bytes=size)
