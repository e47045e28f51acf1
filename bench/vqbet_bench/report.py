"""The tables of a result, for the terminal and as Markdown.

python -m vqbet_bench.report result.json             # prints the tables
python -m vqbet_bench.report result.json FILE.md     # puts them between the file's markers
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vqbet_bench import results
from vqbet_bench.power import total_rail
from vqbet_bench.results import Mode, Report, Result
from vqbet_bench.samples import SAMPLES_NEEDED, summarize
from vqbet_edge.errors import UsageError

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
_NOTHING = "-"


class Grid(NamedTuple):
    """A table in words; the first column is left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As GitHub renders it."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines)


# Policy -> figure -> the figure in words, None where there is none.
Figures = dict[str, dict[str, str | None]]


def _grid(title: str, figures: Figures) -> Grid:
    """A column per policy, a row per figure that any of them has."""
    names = list(dict.fromkeys(name for policy in figures.values() for name in policy))
    rows = [
        (name, *(policy.get(name) or _NOTHING for policy in figures.values())) for name in names
    ]
    kept = [row for row in rows if set(row[1:]) != {_NOTHING}]
    return Grid(title, ("", *figures), kept)


def grids(report: Report) -> list[Grid]:
    """Every table that has rows."""
    at_rate = f"at {report.settings.rate:g} steps a second"
    found = [
        _latency(report, "back_to_back", "Step that predicts a chunk, calls back to back, ms"),
        _latency(report, "paced", f"Step that predicts a chunk, {at_rate}, ms"),
        _latency(report, "every", "Re-planning on every step, calls back to back, ms"),
        _grid("Step that returns a queued action, us", {r.name: _queue(r) for r in report.results}),
        _grid(
            f"From tick to action, {at_rate}",
            {r.name: _deadlines(r, report.settings.rate) for r in report.results},
        ),
        _grid("Start-up, memory, size", {r.name: _costs(r) for r in report.results}),
        *(_bounds(result) for result in report.results if result.bounds),
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


def _latency(report: Report, mode: Mode, title: str) -> Grid:
    base = report.baseline
    rivals = len(report.results) > 1
    return _grid(
        title,
        {r.name: _step(r, mode, base if rivals else None) for r in report.results},
    )


def _step(result: Result, mode: Mode, base: Result | None) -> dict[str, str | None]:
    summary = result.summary(mode, "replan")
    if summary is None:
        return {}
    p50 = result.median_over_rounds(mode, "p50")
    worst = result.median_over_rounds(mode, "worst")
    figures = {
        "p50": _ms(p50),
        **{name: _ms(summary.percentiles.get(name)) for name in ("p90", "p95", "p99", "p99.9")},
        "worst of a round": _ms(worst),
        "worst of all": _ms(summary.worst),
        "standard deviation": _ms(summary.std),
        "interquartile range": _ms(summary.iqr),
        "steps": str(summary.count),
    }
    if base is None:
        return figures
    theirs = base.summary(mode, "replan")
    their_p99 = theirs.percentiles.get("p99") if theirs else None
    return figures | {
        f"{base.name} / this, p50": _ratio(base.median_over_rounds(mode, "p50"), p50),
        f"{base.name} / this, p99": _ratio(their_p99, summary.percentiles.get("p99")),
        f"{base.name} / this, worst": _ratio(base.median_over_rounds(mode, "worst"), worst),
    }


def _queue(result: Result) -> dict[str, str | None]:
    modes: dict[str, Mode] = {"back to back": "back_to_back", "paced": "paced"}
    figures: dict[str, str | None] = {}
    for words, mode in modes.items():
        summary = result.summary(mode, "queue")
        if summary is not None:
            named = {**summary.percentiles, "worst": summary.worst}
            figures |= {
                f"{figure}, {words}": _us(named.get(figure))
                for figure in ("p50", "p90", "p99", "p99.9", "worst")
            }
    return figures


def _deadlines(result: Result, rate: float) -> dict[str, str | None]:
    summary = summarize(result.samples("paced", "responses"))
    if summary is None:
        return {}
    missed, steps = result.misses(1 / rate)
    return {
        "deadlines missed": f"{missed} of {steps} ({missed / steps:.1%})",
        **{f"{name}, ms": _ms(seconds) for name, seconds in summary.percentiles.items()},
        "worst, ms": _ms(summary.worst),
        "standard deviation, ms": _ms(summary.std),
        "energy per action": _energy(result),
    }


def _energy(result: Result) -> str | None:
    rounds = result.rounds.get("paced", [])
    rails = rounds[0].watts if rounds else {}
    total = total_rail(rails)
    joules = [(rail, result.joules_per_action(rail)) for rail in ([total] if total else rails)]
    return ", ".join(f"{rail} {_digits(j)} J" for rail, j in joules if j is not None) or None


def _costs(result: Result) -> dict[str, str | None]:
    memory, sizes, counted = result.memory, result.sizes, result.allocations
    figures = {
        "start-up to the first action, s": _digits(result.start_up),
        "of that, loading the policy, s": _digits(result.load),
        "resident memory, MB": _mb(memory.resident),
        "peak memory, MB": _mb(memory.peak),
        "GPU memory, MB": _mb(memory.gpu),
        "system memory taken, MB": _mb(memory.system),
    }
    if sizes is not None:
        figures |= {
            "bundle on disk, MB": _mb(sizes.bundle),
            "engines on disk, MB": _mb(sizes.engines or None),
            "weights, MB": _mb(sizes.weights),
        }
    if counted is not None:
        figures |= {
            f"net bytes over {counted.calls} calls": str(counted.net),
            "net bytes per call": _digits(counted.net / counted.calls),
            "most bytes held inside a call": str(counted.largest),
        }
    return figures


def _bounds(result: Result) -> Grid:
    ceilings = result.ceilings
    where = f" ({ceilings.source}, {ceilings.bytes_per_second / 1e9:.1f} GB/s)" if ceilings else ""
    rows: list[tuple[str, ...]] = [
        (
            stage,
            f"{b.weight_bytes / 1e6:.2f}",
            f"{b.multiply_adds / 1e6:.1f}",
            _ms(b.memory_bound) or _NOTHING,
            _ms(b.compute_bound) or _NOTHING,
            _ms(b.seconds) or _NOTHING,
            _NOTHING if b.ratio is None else _digits(b.ratio),
        )
        for stage, b in result.bounds.items()
    ]
    columns = ("stage", "weights MB", "million multiply-adds", "memory bound ms",
               "compute bound ms", "measured ms", "x bound")  # fmt: skip
    return Grid(f"{result.name} against the hardware{where}", columns, rows)


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(6, max(0, decimals))}f}"


def _shown(scale: float) -> Callable[[float | None], str | None]:
    return lambda value: None if value is None else _digits(value * scale)


_ms, _us, _mb = _shown(1e3), _shown(1e6), _shown(1e-6)


def _ratio(base: float | None, value: float | None) -> str | None:
    return None if base is None or not value else _digits(base / value)


def insert(text: str, tables: str) -> str:
    """Replace what is between the markers.

    Raises:
        UsageError: there are none.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"expected the markers {BEGIN} and {END} in the file, found none")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> None:
    """Arguments: result.json, and a Markdown file to put the tables into."""
    from vqbet_edge.cli import run  # noqa: PLC0415

    run(_main)


def _main() -> None:
    if len(sys.argv) not in {2, 3}:
        raise UsageError("usage: python -m vqbet_bench.report result.json [FILE.md]")
    tables = markdown(results.decode(Path(sys.argv[1]).read_bytes()))
    if len(sys.argv) == 2:
        sys.stdout.write(tables)
        return
    path = Path(sys.argv[2])
    path.write_text(insert(path.read_text(), tables))


if __name__ == "__main__":
    main()
