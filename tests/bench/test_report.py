"""Tables and JSON of a made-up result."""

from typing import Any

import msgspec
import pytest
from vqbet_bench import report
from vqbet_bench.results import (
    Machine,
    Memory,
    Report,
    Result,
    Round,
    Settings,
    encode,
)


def make_round(
    replan: list[float],
    responses: tuple[float, ...] = (),
    watts: dict[str, float] | None = None,
    disturbance: float = 0.0,
) -> Round:
    return Round(
        replan=list(replan),
        queue=[20e-6] * 20,
        responses=list(responses),
        stages={"gpt": [s / 2 for s in replan]},
        began=10.0,
        ended=12.0,
        disturbance=disturbance,
        watts=watts or {},
    )


def make_result(name: Any, kind: Any, milliseconds: Any, **changes: Any) -> Any:
    # The middle round has the median of the rounds' medians and of their worst steps.
    rounds = [make_round([ms / 1e3] * 20) for ms in milliseconds]
    paced = [make_round([0.01] * 20, (*[0.01] * 39, 0.5), {"VDD_IN": 7.0})]
    return Result(
        name=name,
        kind=kind,
        details={"backend": "onnxruntime"},
        start_up=0.5,
        load=0.25,
        rounds={"back_to_back": rounds, "paced": paced},
        memory=Memory(resident=200_000_000, peak=300_000_000, system=1, sibling=250_000),
        **changes,
    )


@pytest.fixture
def measured() -> Any:
    edge = make_result(
        "ours",
        "bundle",
        [9, 10, 11, 12, 50],
        bundle_bytes=150_000_000,
        stages_alone={"prefill": 0.03},
    )
    return Report(
        format_version=2,
        date="2026-01-01",
        machine=Machine({"processor": "made up"}, {}, ["clocks are not locked"], {}),
        settings=Settings(30.0, 10.0, 5, 2, "random, seeded"),
        results=[edge, make_result("LeRobot", "lerobot", [80, 90, 100, 110, 120])],
        failures={"another": "it is not installed"},
    )


def cell(measured: Report, title: Any, row: Any, policy: Any) -> Any:
    grid = next(g for g in report.grids(measured) if title in g.title)
    return next(r for r in grid.rows if r[0] == row)[grid.columns.index(policy)]


def test_ratios_are_of_the_medians_over_rounds(measured: Report) -> None:
    """100 against 11 ms: one bad round of 50 ms does not count."""
    title = "back to back, ms"
    assert cell(measured, title, "p50", "ours") == "11.0"
    assert cell(measured, title, "LeRobot / this, p50", "ours") == "9.09"
    assert cell(measured, title, "LeRobot / this, worst", "LeRobot") == "1.00"
    assert cell(measured, title, "worst of all", "ours") == "50.0"


def test_a_percentile_without_enough_samples_is_not_in_the_table(measured: Report) -> None:
    grid = report.grids(measured)[0]
    rows = [row[0] for row in grid.rows]
    assert "p90" in rows
    assert "p99" not in rows
    assert not any("p99" in row for row in rows)


def test_deadlines_energy_and_costs(measured: Report) -> None:
    at_rate = "From tick to action"
    assert cell(measured, at_rate, "deadlines missed", "ours") == "1 of 40 (2.5%)"
    # 7 W for 2 s and 40 actions
    assert cell(measured, at_rate, "energy per action", "ours") == "VDD_IN 0.350 J"
    assert cell(measured, "Start-up", "one more robot on the same weights, MB", "ours") == "0.250"
    assert cell(measured, "Start-up", "bundle on disk, MB", "LeRobot") == "-"


def test_stages_are_medians_of_all_rounds(measured: Report) -> None:
    """100 samples, the median of 11 ms halved; what ran alone stands beside it."""
    assert cell(measured, "Stages", "gpt", "ours") == "5.50"
    assert cell(measured, "Stages", "prefill", "ours") == "30.0"
    assert cell(measured, "Stages", "prefill", "LeRobot") == "-"


def test_the_markdown_says_what_is_wrong(measured: Report) -> None:
    text = report.markdown(measured)
    assert "clocks are not locked" in text
    assert "another: it is not installed" in text
    assert "| --- | ---: | ---: |" in text


def test_other_processes_are_a_warning(measured: Report) -> None:
    assert len(report.warnings_of(measured)) == 1
    measured.results[0].rounds["every"] = [make_round([0.1], disturbance=0.5)]
    assert "50%" in report.warnings_of(measured)[-1]


def test_json_has_every_sample(measured: Report) -> None:
    assert msgspec.json.decode(encode(measured), type=Report) == measured


def test_numbers_have_three_digits_and_no_exponent(measured: Report) -> None:
    slow = make_result("slow", "single-graph", [123456.7] * 5)
    measured.results.append(slow)
    assert cell(measured, "back to back, ms", "p50", "slow") == "123457"
