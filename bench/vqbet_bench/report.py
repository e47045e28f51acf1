"""The tables of a result, for the terminal and as Markdown."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from vqbet_bench.power import total_rail
from vqbet_bench.results import Mode, Report, Result
from vqbet_bench.samples import SAMPLES_NEEDED, summarize

_NOTHING = "-"
# Figure -> its words, None where there is none.
Figures = dict[str, str | None]


class Grid(NamedTuple):
    """A table in words; the first column is left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    @classmethod
    def of(cls, title: str, columns: dict[str, Figures]) -> "Grid":
        """A row per figure that any of the columns has."""
        names = dict.fromkeys(name for figures in columns.values() for name in figures)
        rows = [(n, *(figures.get(n) or _NOTHING for figures in columns.values())) for n in names]
        return cls(title, ("", *columns), [row for row in rows if set(row[1:]) != {_NOTHING}])

    def markdown(self) -> str:
        """As GitHub renders it."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines)


def grids(report: Report) -> list[Grid]:
    """Every table that has rows."""
    rate = report.settings.rate
    at_rate = f"at {rate:g} steps a second"
    base = report.baseline if len(report.results) > 1 else None

    def table(title: str, figures: Callable[[Result], Figures]) -> Grid:
        return Grid.of(title, {result.name: figures(result) for result in report.results})

    def steps(title: str, mode: Mode) -> Grid:
        return table(title, lambda result: _steps(result, mode, base))

    found = [
        steps("Step that predicts a chunk, calls back to back, ms", "back_to_back"),
        steps(f"Step that predicts a chunk, {at_rate}, ms", "paced"),
        steps("Re-planning on every step, calls back to back, ms", "every"),
        table("Stages, p50, ms (prefill is ahead of the step)", _stages),
        table("Step that returns a queued action, us", _queued),
        table(f"From tick to action, {at_rate}, ms", lambda result: _responses(result, 1 / rate)),
        table("Start-up, memory, size", _costs),
    ]
    return [grid for grid in found if grid.rows]


def markdown(report: Report) -> str:
    """The whole report but for the picture."""
    settings = report.settings
    facts = "\n".join(f"- {name}: {value}" for name, value in report.machine.facts.items())
    warnings = "".join(f"\n> **Warning:** {text}\n" for text in warnings_of(report))
    failures = "".join(f"\n- not measured: {n}: {why}" for n, why in report.failures.items())
    how = (
        f"{settings.rounds} interleaved rounds, {settings.seconds:g} s per policy and table, "
        f"{settings.threads} threads, observations: {settings.observations}. "
        "Of steps that predict, p50 and the worst of a round are medians over the rounds; other "
        "percentiles are of all samples and are named from so many on: "
        f"{', '.join(f'p{q:g} {n}' for q, n in SAMPLES_NEEDED.items())}."
    )
    tables = "\n\n".join(grid.markdown() for grid in grids(report))
    return f"{report.date}\n\n{facts}\n{warnings}{failures}\n\n{how}\n\n{tables}\n"


def warnings_of(report: Report) -> list[str]:
    """What the machine said, and what the rounds showed."""
    rounds = [r for res in report.results for played in res.rounds.values() for r in played]
    disturbed = max((r.disturbance for r in rounds), default=0.0)
    found = list(report.machine.warnings)
    if disturbed > 0.05:
        found.append(f"other processes took up to {disturbed:.0%} of the processor meanwhile")
    return found


def _steps(result: Result, mode: Mode, base: Result | None) -> Figures:
    samples = result.samples(mode, "replan")
    summary = summarize(samples)
    if not summary:
        return {}
    p50, worst = (result.median_over_rounds(mode, figure) for figure in ("p50", "worst"))
    figures = {
        **_percentiles(summary, 1e3),
        "p50": _scaled(p50, 1e3),
        "worst of a round": _scaled(worst, 1e3),
        "worst of all": _scaled(summary["worst"], 1e3),
        "steps": str(len(samples)),
    }
    if base is None or not (theirs := summarize(base.samples(mode, "replan"))):
        return figures
    return figures | {
        f"{base.name} / this, p50": _ratio(base.median_over_rounds(mode, "p50"), p50),
        f"{base.name} / this, p99": _ratio(theirs.get("p99"), summary.get("p99")),
        f"{base.name} / this, worst": _ratio(base.median_over_rounds(mode, "worst"), worst),
    }


def _percentiles(summary: Mapping[str, float], scale: float) -> Figures:
    """Every percentile, so that rows have one order; None where samples are too few."""
    return {name: _scaled(summary.get(name), scale) for name in (f"p{q:g}" for q in SAMPLES_NEEDED)}


def _stages(result: Result) -> Figures:
    return {stage: _scaled(seconds, 1e3) for stage, seconds in result.stage_medians().items()}


def _queued(result: Result) -> Figures:
    modes: dict[str, Mode] = {"back to back": "back_to_back", "paced": "paced"}
    figures: Figures = {}
    for words, mode in modes.items():
        if summary := summarize(result.samples(mode, "queue")):
            named = _percentiles(summary, 1e6) | {"worst": _scaled(summary["worst"], 1e6)}
            figures |= {f"{name}, {words}": value for name, value in named.items()}
    return figures


def _responses(result: Result, period: float) -> Figures:
    samples = result.samples("paced", "responses")
    if not samples:
        return {}
    # An action that comes after the next tick of the control loop.
    missed, summary = sum(sample > period for sample in samples), summarize(samples)
    return {
        "deadlines missed": f"{missed} of {len(samples)} ({missed / len(samples):.1%})",
        **_percentiles(summary, 1e3),
        "worst": _scaled(summary["worst"], 1e3),
        "energy per action": _energy(result),
    }


def _energy(result: Result) -> str | None:
    rounds = result.rounds.get("paced", [])
    rails = rounds[0].watts if rounds else {}
    total = total_rail(rails)
    joules = [(rail, result.joules_per_action(rail)) for rail in ([total] if total else rails)]
    return ", ".join(f"{rail} {_digits(j)} J" for rail, j in joules if j is not None) or None


def _costs(result: Result) -> Figures:
    memory = result.memory
    return {
        "start-up to the first action, s": _scaled(result.start_up, 1),
        "of that, loading the policy, s": _scaled(result.load, 1),
        "resident memory, MB": _scaled(memory.resident, 1e-6),
        "peak memory, MB": _scaled(memory.peak, 1e-6),
        "one more robot on the same weights, MB": _scaled(memory.sibling, 1e-6),
        "GPU memory, MB": _scaled(memory.gpu, 1e-6),
        "one more robot, GPU memory, MB": _scaled(memory.sibling_gpu, 1e-6),
        "system memory taken, MB": _scaled(memory.system, 1e-6),
        "bundle on disk, MB": _scaled(result.bundle_bytes, 1e-6),
    }


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(6, max(0, decimals))}f}"


def _scaled(value: float | None, scale: float) -> str | None:
    return None if value is None else _digits(value * scale)


def _ratio(base: float | None, value: float | None) -> str | None:
    return None if base is None or not value else _digits(base / value)
