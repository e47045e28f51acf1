"""The result of a run, as result.json holds it. Times are seconds, sizes bytes, power watts."""

from typing import Literal

import numpy as np
from msgspec import Struct

FORMAT_VERSION: Literal[2] = 2
# back_to_back: one call after the other; paced: at the control rate; every: one call after the
# other, re-planning on every step.
Mode = Literal["back_to_back", "paced", "every"]
MODES: tuple[Mode, ...] = ("back_to_back", "paced", "every")


class Round(Struct, frozen=True):
    """What one policy did in one turn.

    Attributes:
        replan: every step that predicted a chunk.
        queue: every step that returned a queued action.
        responses: paced only: from the tick to the action, lateness of earlier steps included.
        stages: of each re-planning step, seconds by stage where the backend tells.
        began, ended: on the system's monotonic clock.
        disturbance: share of the processor that other processes took.
        watts: mean of every power rail that the board reports.
    """

    replan: list[float]
    queue: list[float]
    responses: list[float]
    stages: dict[str, list[float]]
    began: float
    ended: float
    disturbance: float
    watts: dict[str, float] = {}

    @property
    def actions(self) -> int:
        """Steps that were counted."""
        return len(self.replan) + len(self.queue)


class Memory(Struct, frozen=True):
    """Of a policy's process.

    Attributes:
        resident: now.
        peak: the most since its start.
        gpu: taken from the GPU since the process started; None without NVML.
        system: drop of the system's available memory since the process started. On a Jetson this
            is where the GPU's share shows.
        sibling: what one more robot on the same weights adds to `resident`.
        sibling_gpu: what it adds to `gpu`.
    """

    resident: int
    peak: int
    system: int
    gpu: int | None = None
    sibling: int | None = None
    sibling_gpu: int | None = None


class Result(Struct, frozen=True):
    """One policy.

    Attributes:
        name: as tables show it.
        kind: "bundle" or a peer's name.
        details: backend, precision, versions.
        start_up: from starting the process to its first action.
        load: of that, from loading the policy on.
        rounds: mode -> one entry per round.
        memory: after acting.
        stages_alone: stage -> median seconds of runs of it alone, where `Round.stages` lacks it.
        bundle_bytes: on disk.
    """

    name: str
    kind: str
    details: dict[str, str]
    start_up: float
    load: float
    rounds: dict[Mode, list[Round]]
    memory: Memory
    stages_alone: dict[str, float] = {}
    bundle_bytes: int | None = None

    def samples(self, mode: Mode, kind: Literal["replan", "queue", "responses"]) -> list[float]:
        """All rounds' samples."""
        return [s for entry in self.rounds.get(mode, []) for s in getattr(entry, kind)]

    def median_over_rounds(self, mode: Mode, figure: Literal["p50", "worst"]) -> float | None:
        """The median of the rounds' own figures for re-planning steps."""
        reduce = np.median if figure == "p50" else np.max
        found = [float(reduce(r.replan)) for r in self.rounds.get(mode, []) if r.replan]
        return float(np.median(found)) if found else None

    def stage_medians(self) -> dict[str, float]:
        """Stage -> median seconds, back to back or alone; `prefill` is ahead of the step."""
        samples: dict[str, list[float]] = {}
        for entry in self.rounds.get("back_to_back", []):
            for name, seconds in entry.stages.items():
                samples.setdefault(name, []).extend(seconds)
        medians = {name: float(np.median(seconds)) for name, seconds in samples.items()}
        return self.stages_alone | medians

    def joules_per_action(self, rail: str) -> float | None:
        """At the control rate, of one power rail, the board's idle power included."""
        rounds = [r for r in self.rounds.get("paced", []) if rail in r.watts]
        actions = sum(r.actions for r in rounds)
        energy = sum(r.watts[rail] * (r.ended - r.began) for r in rounds)
        return energy / actions if actions else None


class Machine(Struct, frozen=True):
    """Where and in what state it was measured.

    Attributes:
        facts: processor, cores, versions, power mode, garbage collector and so on.
        clocks: every clock's governor and range.
        warnings: what makes the figures less than they seem.
        idle_watts: every power rail before anything ran.
    """

    facts: dict[str, str]
    clocks: dict[str, str]
    warnings: list[str]
    idle_watts: dict[str, float]


class Settings(Struct, frozen=True):
    """How it was measured; fields as the command's options."""

    rate: float
    seconds: float
    rounds: int
    threads: int
    observations: str


class Report(Struct, frozen=True):
    """A whole run."""

    format_version: Literal[2]
    date: str
    machine: Machine
    settings: Settings
    results: list[Result]
    failures: dict[str, str]

    @property
    def baseline(self) -> Result | None:
        """What the others are compared with: LeRobot, else the first."""
        peers = [r for r in self.results if r.kind == "lerobot"]
        return next(iter([*peers, *self.results]), None)
