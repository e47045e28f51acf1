"""From the command's arguments to a report."""

import datetime as dt
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from vqbet_bench.cli import Arguments
from vqbet_bench.machine import describe_machine, hottest
from vqbet_bench.messages import Job, PeerName
from vqbet_bench.observations import create_pool
from vqbet_bench.results import FORMAT_VERSION, Ceilings, Report, Result, Settings, Sizes
from vqbet_bench.session import Plan, Progress, Session, open_session
from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.bundle import Bundle

if TYPE_CHECKING:
    from vqbet_edge.runtime.backends.base import Idle

_PEER_NAMES: dict[PeerName, str] = {
    "lerobot": "LeRobot eager",
    "lerobot-compile": "LeRobot torch.compile",
    "network": "our network, eager",
    "single-graph": "single ONNX graph",
}


def benchmark(arguments: Arguments, progress: Progress) -> Report:
    """Measure everything that the arguments ask for.

    Raises:
        VQBeTEdgeError: the bundles cannot be read or do not belong together.
    """
    bundles = {str(path.absolute()): Bundle.open(path) for path in arguments.bundles}
    first = _checked(bundles)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    progress("looking at the machine")
    machine = describe_machine()
    plan = Plan(arguments.rate, arguments.seconds, arguments.rounds, arguments.allocation_calls)
    with open_session(plan, progress) as run:
        pool_file = run.folder / "pool.npz"
        create_pool(first, arguments.dataset).save(pool_file)
        policy = first.manifest.policy
        job = Job(
            kind="edge",
            path="",
            pool=str(pool_file),
            chunk=policy.action_chunk_size,
            window=policy.n_obs_steps,
            threads=threads,
        )
        _start_peers(run, job, arguments, progress)
        contenders = _contenders(arguments, job)
        for label, contender in contenders.items():
            run.start(label, contender)
        found = run.run()
    after = hottest()
    results = [
        _with_bounds(result, bundles[contenders[result.name].path], arguments, threads, progress)
        if result.name in contenders
        else result
        for result in found
    ]
    return Report(
        format_version=FORMAT_VERSION,
        date=dt.datetime.now(dt.timezone.utc).isoformat(timespec="minutes"),
        machine=replace(
            machine, facts={**machine.facts, **({"hottest afterwards": after} if after else {})}
        ),
        settings=_settings(arguments, threads),
        results=results,
        failures=run.failures,
    )


def _checked(bundles: Mapping[str, Bundle]) -> Bundle:
    """The first bundle, whose observations all of them take."""
    first, *others = bundles.values()
    for bundle in bundles.values():
        if bundle.manifest.batch_size != 1:
            raise UsageError(
                f"'{bundle.path}' was exported for a batch of {bundle.manifest.batch_size}; "
                "measure a bundle for one robot"
            )
    for bundle in others:
        if bundle.manifest.input_features != first.manifest.input_features:
            raise UsageError(
                f"'{bundle.path}' observes other features than '{first.path}'; "
                "measure them one after the other"
            )
    return first


def _contenders(arguments: Arguments, job: Job) -> dict[str, Job]:
    """Every bundle on every backend, with every way of working ahead."""
    found: dict[str, Job] = {}
    idles: tuple[Idle | None, ...] = arguments.idle or (None,)
    for path, backend, idle in itertools.product(arguments.bundles, arguments.backend, idles):
        label = " ".join(filter(None, (path.stem, backend, idle)))
        if label in found:
            raise UsageError(
                f"two bundles are named '{path.stem}'; rename one, or name each of them once"
            )
        found[label] = replace(job, path=str(path.absolute()), backend=backend, idle=idle)
    return found


def _settings(arguments: Arguments, threads: int) -> Settings:
    return Settings(
        rate=arguments.rate,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        threads=threads,
        observations=Path(arguments.dataset).name if arguments.dataset else "random, seeded",
        allocation_calls=arguments.allocation_calls,
    )


def _start_peers(run: Session, job: Job, arguments: Arguments, progress: Progress) -> None:
    if arguments.checkpoint is None:
        return
    checkpoint = str(arguments.checkpoint.absolute())
    for kind in arguments.peers:
        name, path = _PEER_NAMES[kind], checkpoint
        if kind == "single-graph":
            progress(f"exporting the {name}")
            path = str(run.folder / "single.onnx")
            reason = _export_single_graph(checkpoint, path)
            if reason:
                run.failures[name] = reason
                continue
        run.start(name, replace(job, kind=kind, path=path, device=arguments.peer_device))


def _export_single_graph(checkpoint: str, output: str) -> str:
    """In a process of its own, so that torch is in nobody's memory; why it failed, or nothing."""
    command = module_command("vqbet_bench.whole_policy", checkpoint, output)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stderr[-1000:].strip() or "no reason given" if done.returncode else ""


def _with_bounds(
    result: Result, bundle: Bundle, arguments: Arguments, threads: int, progress: Progress
) -> Result:
    """Add sizes and, where `onnx` is installed, the roofline."""
    progress(f"{result.name}: counting its graphs")
    sizes = Sizes(
        bundle=sum(spec.size for spec in bundle.manifest.files.values()),
        engines=sum(p.stat().st_size for p in bundle.path.glob("engines/*/*.plan")),
        weights=None,
    )
    try:
        from vqbet_bench.roofline import stage_bounds, stage_runs, total_weights  # noqa: PLC0415
    except ModuleNotFoundError as error:
        sys.stderr.write(f"no roofline: {error}; pip install 'vqbet-edge[bench]'\n")
        return replace(result, sizes=sizes)
    try:
        runs = stage_runs(bundle, result)
    except ValueError as error:
        sys.stderr.write(f"no roofline of {result.name}: {error}\n")
        return replace(result, sizes=sizes)
    weights = total_weights(runs)
    ceilings = _ceilings(result, weights, arguments, threads)
    bounds = stage_bounds(runs, ceilings, result.stage_medians()) if ceilings else {}
    sizes = replace(sizes, weights=weights)
    return replace(result, sizes=sizes, bounds=bounds, ceilings=ceilings)


def _ceilings(result: Result, weights: int, arguments: Arguments, threads: int) -> Ceilings | None:
    """Of what the backend runs on; None for a GPU that has no profile."""
    from vqbet_engines.boards import detect_board  # noqa: PLC0415

    from vqbet_bench.ceilings import board_ceilings  # noqa: PLC0415

    if result.on_processor:
        command = module_command("vqbet_bench.ceilings", str(weights), str(threads))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(  # noqa: S603
            command, env=environment, stdout=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise VQBeTEdgeError("the processor's bandwidth could not be measured; see above")
        return msgspec.json.decode(done.stdout, type=Ceilings)
    board = arguments.board or detect_board()
    return board_ceilings(board) if board else None
