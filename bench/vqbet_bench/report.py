"""The tables of a result, for the terminal and as Markdown.

python -m vqbet_bench.report result.json             # prints the tables
python -m vqbet_bench.report result.json FILE.md     # puts them between the file's markers
"""

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


def grids(report: Report) -> list[Grid]:
    """Every table that has rows."""
    settings = report.settings
    found = [
        _latency(report, "back_to_back", "Step that predicts a chunk, calls back to back, ms"),
        _latency(
            report, "paced", f"Step that predicts a chunk, at {settings.rate:g} steps a second, ms"
        ),
        _latency(report, "every", "Re-planning on every step, back to back, ms"),
        _queue(report),
        _deadlines(report),
        _costs(report),
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
        "p50 and worst: median of the rounds' own; other percentiles: of all samples, named only "
        "from as many samples on as they need "
        f"({', '.join(f'p{q:g}: {n}' for q, n in SAMPLES_NEEDED.items())}); "
        "x: times slower than this, what the first line, or LeRobot, takes."
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
    columns = ("policy", "steps", "p50", "x", "p90", "p95", "p99", "x", "p99.9", "worst", "x",
               "std", "IQR")  # fmt: skip
    base = report.baseline
    rows = []
    for result in report.results:
        summary = result.summary(mode, "replan")
        if summary is None or base is None:
            continue
        named, other = summary.percentiles, base.summary(mode, "replan")
        p50, worst = (result.median_over_rounds(mode, f) for f in ("p50", "worst"))  # type: ignore[arg-type]
        rows.append(
            (
                result.name,
                str(summary.count),
                _ms(p50),
                _times(base.median_over_rounds(mode, "p50"), p50),
                _ms(named.get("p90")),
                _ms(named.get("p95")),
                _ms(named.get("p99")),
                _times(other.percentiles.get("p99") if other else None, named.get("p99")),
                _ms(named.get("p99.9")),
                _ms(worst),
                _times(base.median_over_rounds(mode, "worst"), worst),
                _ms(summary.std),
                _ms(summary.iqr),
            )
        )
    return Grid(title, columns, rows)


def _queue(report: Report) -> Grid:
    figures = ("p50", "p90", "p99", "worst")
    columns = ("policy", *figures, *(f"paced {figure}" for figure in figures))
    rows = []
    for result in report.results:
        found = [result.summary(mode, "queue") for mode in ("back_to_back", "paced")]  # type: ignore[arg-type]
        cells = [
            _us({**s.percentiles, "worst": s.worst}.get(figure) if s else None)
            for s in found
            for figure in figures
        ]
        rows.append((result.name, *cells))
    kept = [row for row in rows if set(row[1:]) != {_NOTHING}]
    return Grid("Step that returns a queued action, us", columns, kept)


def _deadlines(report: Report) -> Grid:
    rate = report.settings.rate
    rows = []
    for result in report.results:
        responses = result.samples("paced", "responses")
        summary = summarize(responses)
        if summary is None:
            continue
        missed, steps = result.misses(1 / rate)
        rows.append(
            (
                result.name,
                str(steps),
                f"{missed} ({missed / steps:.1%})",
                _ms(summary.percentiles.get("p99")),
                _ms(summary.worst),
                _ms(summary.std),
                _energy(result),
            )
        )
    title = f"At {rate:g} steps a second: from tick to action, ms"
    columns = ("policy", "steps", "missed", "p99", "worst", "std", "energy per action")
    return Grid(title, columns, rows)


def _energy(result: Result) -> str:
    rounds = result.rounds.get("paced", [])
    rails = rounds[0].watts if rounds else {}
    total = total_rail(rails)
    joules = [(rail, result.joules_per_action(rail)) for rail in ([total] if total else rails)]
    return ", ".join(f"{rail} {j:.3g} J" for rail, j in joules if j is not None) or _NOTHING


def _costs(report: Report) -> Grid:
    columns = ("policy", "start-up s", "load s", "resident MB", "peak MB", "GPU MB", "system MB",
               "bundle MB", "engines MB", "weights MB", "net bytes per call",
               "largest bytes in a call")  # fmt: skip
    rows = []
    for r in report.results:
        sizes, counted = r.sizes, r.allocations
        rows.append(
            (
                r.name,
                f"{r.start_up:.2f}",
                f"{r.load:.2f}",
                *map(_mb, (r.memory.resident, r.memory.peak, r.memory.gpu, r.memory.system)),
                _mb(sizes.bundle if sizes else None),
                _mb(sizes.engines if sizes else None),
                _mb(sizes.weights if sizes else None),
                f"{counted.net / counted.calls:.3g}" if counted else _NOTHING,
                str(counted.largest) if counted else _NOTHING,
            )
        )
    return Grid("Start-up, memory, size", columns, rows)


def _bounds(result: Result) -> Grid:
    ceilings = result.ceilings
    where = f" ({ceilings.source}, {ceilings.bytes_per_second / 1e9:.1f} GB/s)" if ceilings else ""
    rows = [
        (
            stage,
            f"{b.weight_bytes / 1e6:.2f}",
            f"{b.multiply_adds / 1e6:.1f}",
            _ms(b.memory_bound),
            _ms(b.compute_bound),
            _ms(b.seconds),
            _NOTHING if b.ratio is None else f"{b.ratio:.1f}",
        )
        for stage, b in result.bounds.items()
    ]
    columns = ("stage", "weights MB", "million multiply-adds", "memory bound ms",
               "compute bound ms", "measured ms", "x bound")  # fmt: skip
    return Grid(f"{result.name} against the hardware{where}", columns, rows)


def _shown(scale: float, form: str) -> Callable[[float | None], str]:
    return lambda value: _NOTHING if value is None else format(value * scale, form)


_ms, _us, _mb = _shown(1e3, ".3g"), _shown(1e6, ".3g"), _shown(1e-6, ".0f")


def _times(base: float | None, value: float | None) -> str:
    return _NOTHING if base is None or not value else f"{base / value:.1f}"


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
    from vqbet_edge.commands import run  # noqa: PLC0415

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
