"""The load bench: what it counts. Nothing is asserted about time."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vqbet_serve import load


def test_a_server_beside_processes(mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    options = ["--robots", "1", "2", "--seconds", "0.5", "--backend", "onnxruntime"]
    command = [sys.executable, "-m", "vqbet_serve.load", str(mini), *options, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    ways = [(each["robots"], each["way"]) for each in results]
    assert ways == [(1, "server"), (1, "processes"), (2, "server"), (2, "processes")]
    for each in results:
        assert 0 < each["steps"] <= 15 * each["robots"]
        assert 0 < each["p50"] <= each["p95"] <= each["p99"] <= each["worst"]
        assert 0 <= each["late"] <= 1
        assert each["memory_mb"] > 10
    assert done.stdout.count("\n") == 2 + len(results)


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vqbet_serve.load", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("slowness", [0.5, 2.5])
def test_a_late_robot_goes_on_with_the_newest_observation(slowness: float) -> None:
    """2.5 periods per step: it sees every second or third observation, and misses the others."""
    period, acted = 0.02, []

    async def act(step: int) -> None:
        acted.append(step)
        await asyncio.sleep(slowness * period)

    paced = asyncio.run(load.paced(act, 40, time.monotonic(), period))
    assert acted == sorted(set(acted))
    assert len(paced.seconds) == sum(step >= load._WARM_STEPS for step in acted)
    assert min(paced.seconds) >= slowness * period
    if slowness > 1:
        assert paced.missed >= len(paced.seconds) / 2
    assert len(paced.seconds) + paced.missed >= 40
    measured = load.Measured.of("server", [paced, paced], period, 1.0)
    late = sum(seconds > period for seconds in paced.seconds) + paced.missed
    assert measured.late == pytest.approx(late / (len(paced.seconds) + paced.missed))
