"""The load bench: what it counts. Nothing is asserted about time."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from vqbet_bench import serving
from vqbet_bench.cli import main

from vqbet_edge import VQBeTEdgeError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.extras import install_command

COMMAND = [sys.executable, "-c", "from vqbet_bench.cli import main; main()"]


@pytest.mark.extended
def test_a_server_beside_processes(mini: Path, tmp_path: Path) -> None:
    options = ["--serve", "2", "1", "--seconds", "0.5", "--backend", "onnxruntime"]
    command = [*COMMAND, mini, *options, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out/serve.json").read_text())
    results = written["results"]
    assert written["machine"]["facts"]["processor"] in done.stdout
    ways = [(each["robots"], each["way"]) for each in results]
    assert ways == [
        (1, "server"),
        (1, "processes"),
        (2, "server"),
        (2, "server, each alone"),
        (2, "processes"),
    ]
    for each in results:
        assert each["bundle"] == mini.name
        assert 0 < each["steps"] <= 15 * each["robots"]
        assert 0 < each["p50"] <= each["p95"] <= each["p99"] <= each["worst"]
        assert 0 <= each["late"] <= 1
        assert each["memory_mb"] > 10
        assert each["steps_per_s"] == each["steps"] / 0.5
        # Of another process it is told in hundredths of a second.
        assert 0 <= each["cpu_ms"] < 1e3
        assert each["cpu_ms"] > 0 or each["way"] != "processes"
    assert done.stdout.count("\n|") == 1 + len(results)
    assert done.stdout in (tmp_path / "out/serve.md").read_text()


def of_a_policy(process: psutil.Process) -> bool:
    return "multiprocessing.spawn" in " ".join(process.cmdline())


def test_a_process_that_dies_is_not_waited_for(mini: Path) -> None:
    """The kernel kills one where memory is short."""

    def kill_one() -> None:
        while not (started := [c for c in psutil.Process().children() if of_a_policy(c)]):
            time.sleep(0.01)
        started[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    load = serving.Load(Bundle.open(mini), 30.0, 600.0, "onnxruntime")
    with pytest.raises(VQBeTEdgeError, match=r"one of 2 processes .* fewer with --serve"):
        serving.drive(load, "processes", 2)
    killer.join()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["none", "--serve", "1"], 4, "is not a bundle"),
        (["MINI", "--serve", "0"], 2, "--serve takes numbers of robots, 1 or more"),
        (["MINI", "--serve", "1", "--backend", "tensorrt_rtx"], 2, "one of vqbet-serve's backends"),
    ],
)
def test_what_cannot_be_measured(
    mini: Path, monkeypatch: Any, capsys: Any, options: list[str], code: int, words: str
) -> None:
    arguments = [str(mini) if option == "MINI" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["vqbet-bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    assert words in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_type(mini: Path, tmp_path: Path) -> None:
    (tmp_path / "websockets.py").write_text("raise ModuleNotFoundError('no', name='websockets')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*COMMAND, mini, "--serve", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 6
    assert install_command("bench", "serve", "cpu") in done.stderr


def test_processes_that_would_not_fit_are_not_started() -> None:
    assert serving.too_much(64, 1e9).endswith("are available: not measured.")
    assert serving.too_much(64, 0.0) == ""


@pytest.mark.parametrize("slowness", [0.5, 2.5])
def test_a_late_robot_goes_on_with_the_newest_observation(slowness: float) -> None:
    """2.5 periods per step: it sees every second or third observation, and misses the others."""
    period, acted = 0.02, []

    async def act(step: int) -> None:
        acted.append(step)
        await asyncio.sleep(slowness * period)

    paced = asyncio.run(serving.paced(act, 40, time.monotonic(), period))
    assert acted == sorted(set(acted))
    assert len(paced.seconds) == sum(step >= serving._WARM_STEPS for step in acted)
    assert min(paced.seconds) >= slowness * period
    if slowness > 1:
        assert paced.missed >= len(paced.seconds) / 2
    assert len(paced.seconds) + paced.missed >= 40
    measured = serving.summarized([paced, paced], period)
    late = sum(seconds > period for seconds in paced.seconds) + paced.missed
    assert measured["late"] == pytest.approx(late / (len(paced.seconds) + paced.missed))
