"""Tables of a made-up result."""

from typing import Any

import pytest
from vqbet_bench import report
from vqbet_bench.results import Machine, Memory, Report, Result, Round, Settings


def make_round(replan: list[float], responses: Any = (), disturbance: float = 0.0) -> Round:
    stages = {"gpt": [s / 2 for s in replan]}
    queue, watts = [20e-6] * 20, {"VDD_IN": 7.0}
    return Round(replan, queue, list(responses), stages, 10.0, 12.0, disturbance, watts)


def make_result(name: str, kind: str, milliseconds: list[float], **changes: Any) -> Result:
    # The middle round has the median of the rounds' medians and of their worst steps.
    return Result(
        name=name,
        kind=kind,
        details={"backend": "onnxruntime"},
        start_up=0.5,
        load=0.25,
        rounds={
            "back_to_back": [make_round([ms / 1e3] * 20) for ms in milliseconds],
            "paced": [make_round([0.01] * 20, (*[0.01] * 39, 0.5))],
        },
        memory=Memory(resident=200_000_000, peak=300_000_000, system=1, sibling=250_000),
        **changes,
    )


@pytest.fixture
def measured() -> Report:
    of_bundle = {"bundle_bytes": 150_000_000, "stages_alone": {"prefill": 0.03}}
    return Report(
        format_version=2,
        date="2026-01-01",
        machine=Machine({"processor": "made up"}, {}, ["clocks are not locked"], {}),
        settings=Settings(30.0, 10.0, 5, 2, "random, seeded"),
        results=[
            make_result("ours", "bundle", [9, 10, 11, 12, 50], **of_bundle),
            make_result("LeRobot", "lerobot", [80, 90, 100, 110, 123456.7]),
        ],
        failures={"another": "it is not installed"},
    )


def test_what_the_tables_say(measured: Report) -> None:
    """One bad round does not count; three digits and no exponent; samples too few name nothing."""
    grids = {grid.title: grid for grid in report.grids(measured)}

    def cell(title: str, row: str, policy: str) -> str:
        grid = next(grid for name, grid in grids.items() if title in name)
        (found,) = (r for r in grid.rows if r[0] == row)
        return found[grid.columns.index(policy)]

    steps = "back to back, ms"
    assert cell(steps, "p50", "ours") == "11.0"
    assert cell(steps, "LeRobot / this, p50", "ours") == "9.09"
    assert cell(steps, "LeRobot / this, worst", "LeRobot") == "1.00"
    assert cell(steps, "worst of all", "ours") == "50.0"
    assert cell(steps, "worst of all", "LeRobot") == "123457"
    rows = [row[0] for row in report.grids(measured)[0].rows]
    assert "p90" in rows
    assert not any("p99" in row for row in rows)
    assert cell("From tick to action", "deadlines missed", "ours") == "1 of 40 (2.5%)"
    # 7 W for 2 s and 40 actions
    assert cell("From tick to action", "energy per action", "ours") == "VDD_IN 0.350 J"
    assert cell("Start-up", "one more robot on the same weights, MB", "ours") == "0.250"
    assert cell("Start-up", "bundle on disk, MB", "LeRobot") == "-"
    # 100 samples, the median of 11 ms halved; what ran alone stands beside it.
    assert cell("Stages", "gpt", "ours") == "5.50"
    assert cell("Stages", "prefill", "ours") == "30.0"
    assert cell("Stages", "prefill", "LeRobot") == "-"


def test_the_markdown_says_what_is_wrong(measured: Report) -> None:
    measured.results[0].rounds["every"] = [make_round([0.1], disturbance=0.5)]
    text = report.markdown(measured)
    for said in ("clocks are not locked", "another: it is not installed", "| --- | ---: | ---: |"):
        assert said in text
    assert "other processes took up to 50%" in text
