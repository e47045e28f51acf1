"""Training in several processes, which are counted inside."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sizes import SMALL, losses

from vqbet_edge.training.config import TrainConfig, flag
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.trainer import train

# Started in each process; `accelerate launch --cpu` of some releases starts one, whatever it is told.
PROGRAM = """
import os
import signal
from accelerate import PartialState
from vqbet_edge.training import trainer
from vqbet_edge.training.cli import main
from vqbet_edge.training.checkpoints import Checkpoints
from vqbet_edge.training.phases import Phase
start = Checkpoints.start
def started(self):
    print("starts", flush=True)
    return start(self)
Checkpoints.start = started
update = Phase.update
def updated(self, step, *arguments):
    if step == 4 and os.environ.get("STOPS") == os.environ["RANK"]:
        signal.raise_signal(signal.SIGTERM)
    return update(self, step, *arguments)
Phase.update = updated
trainer.write_report = trainer.draw_curves = lambda *_: None
trainer.text = lambda _: ""
try:
    main()
finally:
    state = PartialState()
    print("process", state.process_index, "of", state.num_processes, flush=True)
"""
# Dropout, crops and codes are drawn at random.
CHOSEN: dict[str, Any] = {
    **SMALL,
    "steps": 6,
    "n_vqvae_training_steps": 3,
    "batch_size": 8,
    "n_obs_steps": 2,
    "n_action_pred_token": 1,
    "crop_shape": (56, 56),
    "vqvae_embedding_dim": 16,
    "vqvae_enc_hidden_dim": 16,
    "scheduler_warmup_steps": 1,
    "log_every": 1,
    "save_every": 100,
    "validate_every": 2,
    "validation_fraction": 0.25,
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Episodes of 17 frames: of a batch of 8, the last one for validation leaves processes none."""
    random = np.random.default_rng(0)
    demonstrations = [
        {
            "observation.image": random.integers(0, 256, (17, 64, 64, 3), np.uint8),
            "observation.state": random.uniform(-1, 1, (17, 2)).astype(np.float32),
            "action": random.uniform(-1, 1, (17, 2)).astype(np.float32),
        }
        for _ in range(4)
    ]
    write_dataset(tmp_path / "data", demonstrations, fps=10, task="move")
    return tmp_path / "data"


def in_processes(count: int, folder: Path, options: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Train in so many processes that know of each other; how each one ended, and what it said."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program)]
    for name, value in options.items():
        if isinstance(value, bool) and name != "stream_frames":  # which may be None too
            command.append(flag(name if value else f"no_{name}"))
        else:
            command += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # What torchrun sets, without its search for a meeting point.
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    said = [process.communicate(timeout=600) for process in running]
    return [(process.returncode, *text) for process, text in zip(running, said, strict=True)]


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"crop_per_sample": True, "gradient_accumulation_steps": 2}),
        pytest.param(
            4,
            {"sequentially_select": True, "stream_frames": True, "num_workers": 1},
            marks=pytest.mark.extended,
        ),
    ],
)
def test_many_processes_reach_the_losses_of_one(
    dataset: Path,
    tmp_path: Path,
    count: int,
    options: dict[str, Any],
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    chosen = {"dataset": str(dataset), **CHOSEN, **options}
    train(TrainConfig(**chosen | {"output": one, "gradient_accumulation_steps": 1}))
    ended = in_processes(count, tmp_path, {"output": many, **chosen})
    for number, (status, printed, failed) in enumerate(ended):
        assert status == 0, failed
        assert f"process {number} of {count}" in printed
        # One process puts the folder of the run in order.
        assert ("starts" in printed) == (number == 0)
    kinds = {record["kind"] for record in read_metrics(many / "metrics.jsonl")}
    assert {"phase 1 validation", "phase 2 validation"} <= kinds
    for expected, got in zip(losses(one), losses(many), strict=True):
        assert got.pop("kind") == expected.pop("kind")
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.usefixtures("without_report")
@pytest.mark.extended
def test_a_signal_to_one_stops_all_and_what_the_first_finds_all_know(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others read nothing in the run's folder: it may be on a disk that they do not see."""
    train(TrainConfig(dataset=str(dataset), output=tmp_path / "one", **CHOSEN))
    chosen = {"dataset": str(dataset), "output": tmp_path / "run", **CHOSEN}
    monkeypatch.setenv("STOPS", "1")
    assert [code for code, *_ in in_processes(2, tmp_path, chosen)] == [130, 143]
    assert (tmp_path / "run/checkpoints/last").resolve().name == "000005"
    monkeypatch.delenv("STOPS")
    for changes, status, message in (
        ({"dataset": "nowhere"}, 4, "neither a folder nor the id of a data set"),
        ({}, 2, "holds a run already"),
        ({"resume": True}, 0, ""),
    ):
        for code, _, said in in_processes(2, tmp_path, {**chosen, **changes}):
            assert code == status, said
            assert message in " ".join(said.split())
            assert "Traceback" not in said
    one, run = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "run"))
    assert [r["step"] for r in run] == [r["step"] for r in one]
    found, expected = ([r["primary"] for r in run if "primary" in r] for run in (run, one))
    assert found[-3:] == pytest.approx(expected[-3:], rel=1e-4)
