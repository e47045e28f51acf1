"""A step of Robot Utility Models or Contact-Anchored Policies: their own `step()` beside `act`.

    python bench/nyu.py --repository CLONE --checkpoint X.pt --bundles FP32 INT8 --output nyu.json

Theirs is called as their `run.py` and `Controller` do: frame to tensor, the whole window encoded at
every step, eager PyTorch. tools/nyu_checkpoints.py makes a checkpoint, tools/nyu_parity.py bundles.
Each policy is a process of its own; they take turns, back to back and paced at both rates. Needs
what tools/nyu_reference.py needs.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from vqbet_bench.machine import describe_machine, limit_processors
from vqbet_bench.memory import Baseline
from vqbet_bench.policies import Policy
from vqbet_bench.results import Mode, Round
from vqbet_bench.samples import summarize
from vqbet_bench.timing import Clock, RoundPlan, run_round

TOOLS = Path(__file__).parents[1] / "tools"
# Of RUM's data, and what CAP's loop aims at.
RATES = (4.0, 10.0)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    repository: Path
    checkpoint: Path
    bundles: tuple[Path, ...]
    # Where the figures go.
    output: Path
    # Of a policy and a mode, in one turn.
    seconds: float = 10
    turns: int = 3
    threads: int = 2


class Theirs(Policy):
    """Their policy on the CPU, eager."""

    def __init__(self, options: Options) -> None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(options.threads)
        sys.path.insert(0, str(TOOLS))
        import nyu_reference  # noqa: PLC0415

        self.chunk, self.details = 1, {"torch": torch.__version__}
        family = nyu_reference.open_repository(options.repository)
        self._policy = nyu_reference.Theirs(family, options.checkpoint, family.full)

    def start(self, *, every: bool) -> None:  # noqa: ARG002 - it knows no other way
        """An empty window."""
        self._policy.reset()

    def prepare(self, step: int) -> Any:  # noqa: ANN401
        """Frame and goal."""
        return seen(step)

    def act(self, observation: Any) -> Any:  # noqa: ANN401
        """`Controller`'s lines around `step`."""
        return self._policy.step(*observation)


class Bundle(Policy):
    """`EdgePolicy.act`."""

    def __init__(self, bundle: Path) -> None:
        from vqbet_edge import EdgePolicy  # noqa: PLC0415

        self._policy = EdgePolicy.load(bundle, "onnxruntime")
        self._keys = self._policy.manifest.input_features
        self.chunk, self.details = 1, {"precision": ", ".join(self._policy.manifest.precisions)}

    def start(self, *, every: bool) -> None:  # noqa: ARG002 - the chunk is one action
        """An empty window."""
        self._policy.reset()

    def prepare(self, step: int) -> Any:  # noqa: ANN401
        """What the bundle's manifest asks for."""
        frame, goal = seen(step)
        return {key: goal if "goal" in key else frame for key in self._keys}

    def act(self, observation: Any) -> Any:  # noqa: ANN401
        """Checks included."""
        return self._policy.act(observation)


_FRAMES = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), np.uint8)


def seen(step: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A frame (256, 256, 3) and a goal (3,) in metres; what is in them takes no time."""
    return _FRAMES[step % len(_FRAMES)], np.array([0, 0.4, 0.1], np.float32)


def worker(connection: Connection, options: Options, bundle: Path | None, began: float) -> None:
    """Load, act once, then play what is asked for until told to end."""
    limit_processors(options.threads)
    baseline = Baseline.take()
    policy = Theirs(options) if bundle is None else Bundle(bundle)
    policy.act(policy.prepare(0))
    connection.send((time.monotonic() - began, policy.details))
    while (plan := connection.recv()) is not None:
        connection.send((run_round(policy, plan, Clock()), baseline.now()))


class Process:
    """A policy's process that has acted once."""

    def __init__(self, options: Options, bundle: Path | None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = (theirs, options, bundle, time.monotonic())
        self._process = spawn.Process(target=worker, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.start_up, self.details = self._connection.recv()
        self.rounds: dict[str, list[Round]] = {}
        self.memory: Any = None

    def play(self, name: str, plan: RoundPlan) -> None:
        """One round."""
        self._connection.send(plan)
        played, self.memory = self._connection.recv()
        self.rounds.setdefault(name, []).append(played)

    def close(self) -> None:
        """End it."""
        self._connection.send(None)
        self._process.join()

    def figures(self) -> dict[str, object]:
        """Of all turns."""
        return {
            **self.details,
            "start-up with the first action, s": self.start_up,
            "resident memory, MB": self.memory.resident / 1e6,
            "most of it, MB": self.memory.peak / 1e6,
            "step, ms": {name: self._milliseconds(rounds) for name, rounds in self.rounds.items()},
        }

    @staticmethod
    def _milliseconds(rounds: list[Round]) -> dict[str, object]:
        steps = [1e3 * each for played in rounds for each in played.replan]
        others = statistics.median(played.disturbance for played in rounds)
        return {**summarize(steps), "steps": len(steps), "busy with others": others}


def ratios(theirs: Process, ours: Process) -> dict[str, float]:
    """Median of the turns' ratios of medians: what disturbs a turn disturbs both."""

    def ratio(name: str) -> float:
        pairs = zip(theirs.rounds[name], ours.rounds[name], strict=True)
        return statistics.median(float(np.median(a.replan) / np.median(b.replan)) for a, b in pairs)

    return {name: ratio(name) for name in theirs.rounds}


def main(options: Options) -> None:
    """Measure, and write the figures."""
    # Of every process's threads; before any of them loads what reads it.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    machine = describe_machine()
    modes: dict[str, tuple[Mode, float]] = {"back to back": ("back_to_back", 1)}
    modes |= {f"{rate:g} Hz": ("paced", rate) for rate in RATES}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, bundle in {"theirs": None, **{b.name: b for b in options.bundles}}.items():
            processes[name] = Process(options, bundle)
            stack.callback(processes[name].close)
        for _ in range(options.turns):
            for name, (mode, rate) in modes.items():
                for process in processes.values():
                    plan = RoundPlan(mode=mode, rate=rate, seconds=options.seconds, min_replans=1)
                    process.play(name, plan)
    theirs = processes["theirs"]
    report = {
        "machine": machine.facts,
        "warnings": machine.warnings,
        "threads": options.threads,
        "turns": options.turns,
        "policies": {name: each.figures() for name, each in processes.items()},
        "theirs / ours": {
            name: ratios(theirs, each) for name, each in processes.items() if each is not theirs
        },
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report["theirs / ours"], indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
