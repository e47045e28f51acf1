"""What recording decisions costs `act`: with and without, taking turns in one process.

    python -m vqbet_bench.recording pusht-fp32.bundle --rate 30

One policy acts in turns of so many steps; every other turn is recorded, and who begins alternates.
The same observations, weights and threads serve both, so what differs is the recording.
"""

import json
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vqbet_bench.observations import Observations, create_observations
from vqbet_bench.samples import Summary, summarize
from vqbet_bench.timing import Clock
from vqbet_edge.cli import run
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.policy import EdgePolicy

WARM_UP_STEPS = 200


@dataclass(frozen=True)
class Arguments:
    """How much slower acting is while decisions are recorded."""

    bundle: tyro.conf.Positional[Path]
    # Who runs it.
    backend: BackendName = "auto"
    # Steps a second, as a robot takes them; 0 is one call after the other.
    rate: float = 0.0
    # Steps of one turn.
    steps: int = 500
    # Turns of each kind.
    turns: int = 10
    # Where recordings go meanwhile: a folder on the disk in question.
    folder: Annotated[Path, tyro.conf.arg(help_behavior_hint="(here)")] = Path()
    # Observations: a LeRobot data set or a recording; seeded noise without it.
    dataset: str | None = None
    # Print JSON with every sample.
    json: bool = False


@dataclass
class Measured:
    """Seconds of every call."""

    all_steps: list[float] = field(default_factory=list)
    predicting: list[float] = field(default_factory=list)


def measure(arguments: Arguments) -> dict[str, Measured]:
    """Act in turns; "off" and "on"."""
    observations = create_observations(Bundle.open(arguments.bundle), arguments.dataset)
    found = {"off": Measured(), "on": Measured()}
    work = Path(tempfile.mkdtemp(prefix="recorded-", dir=arguments.folder))
    try:
        with EdgePolicy.load(arguments.bundle, arguments.backend) as policy:
            _act(policy, observations, WARM_UP_STEPS, 0.0, Measured())
            for turn in range(arguments.turns):
                for kind in ("off", "on") if turn % 2 else ("on", "off"):
                    folder = work / str(turn)
                    policy.reset(seed=turn)
                    recording = policy.record(folder, decisions=True)
                    with recording if kind == "on" else nullcontext():
                        steps, rate = arguments.steps, arguments.rate
                        _act(policy, observations, steps, rate, found[kind])
    finally:
        shutil.rmtree(work)
    return found


def _act(
    policy: EdgePolicy, observations: Observations, steps: int, rate: float, into: Measured
) -> None:
    clock = Clock()
    tick, before = clock.now(), policy.last
    for step in range(steps):
        observation = observations[step]
        if rate:
            tick += 1 / rate
            clock.sleep_until(tick)
        start = time.perf_counter()
        policy.act(observation)
        seconds = time.perf_counter() - start
        into.all_steps.append(seconds)
        if policy.last is not before:
            into.predicting.append(seconds)
            before = policy.last


def table(found: dict[str, Measured]) -> str:
    """Milliseconds off and on, and their ratio."""
    lines = [f"{'':24}{'off, ms':>10}{'on, ms':>10}{'on / off':>10}"]
    for what in ("all_steps", "predicting"):
        off, on = (_figures(summarize(getattr(found[kind], what))) for kind in ("off", "on"))
        for name in off.keys() & on.keys():
            row = f"{off[name] * 1e3:10.3f}{on[name] * 1e3:10.3f}{on[name] / off[name]:10.3f}"
            lines.append(f"{what.replace('_', ' ') + ', ' + name:24}{row}")
    return "\n".join([lines[0], *sorted(lines[1:])])


def _figures(summary: Summary | None) -> dict[str, float]:
    return {} if summary is None else {**summary.percentiles, "worst": summary.worst}


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m vqbet_bench.recording")
    found = measure(arguments)
    text = json.dumps({k: asdict(m) for k, m in found.items()}) if arguments.json else table(found)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
