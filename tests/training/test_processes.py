"""Training in several processes, which are counted inside."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sizes import SMALL

from vqbet_edge.training import trainer
from vqbet_edge.training.config import TrainConfig, flag
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.trainer import train

# Started in each process; `accelerate launch --cpu` of some releases starts one, whatever it is told.
PROGRAM = """
import sys
from accelerate import PartialState
from vqbet_edge.training import trainer
from vqbet_edge.training.cli import main
state = PartialState(cpu=True)
assert state.num_processes == 2, state
print("process", state.process_index, "of", state.num_processes, flush=True)
trainer.write_report = trainer.draw_curves = lambda *_: None
trainer.text = lambda _: ""
main()
"""
# What is drawn at random differs between processes, so nothing is: no dropout, a fixed crop, and a
# temperature at which the most probable code is always taken.
CHOSEN: dict[str, Any] = {
    **SMALL,
    "steps": 5,
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
    "dropout": 0.0,
    "bet_softmax_temperature": 1e-6,
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Episodes of 17 frames: of a batch of 8, the last one for validation leaves one process none."""
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


def in_processes(command: list[str], count: int) -> list[str]:
    """Run a command in so many processes that know of each other; what each one printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # What torchrun sets, without its search for a meeting point.
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == count * [0], ended
    return [output for output, _ in ended]


def test_two_processes_reach_the_losses_of_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("write_report", "draw_curves", "text"):
        monkeypatch.setattr(trainer, name, lambda *_: "")
    one, two = tmp_path / "one", tmp_path / "two"
    train(TrainConfig(dataset=str(dataset), output=one, crop_is_random=False, **CHOSEN))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), "--dataset", str(dataset), "--output", str(two)]
    command.append("--no-crop-is-random")
    for name, value in CHOSEN.items():
        command += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    for number, output in enumerate(in_processes(command, 2)):
        assert f"process {number} of 2" in output
    kinds = {record["kind"] for record in read_metrics(two / "metrics.jsonl")}
    assert {"phase 1 validation", "phase 2 validation"} <= kinds
    records = [read_metrics(path / "metrics.jsonl") for path in (one, two)]
    for expected, got in zip(*records, strict=True):
        if expected["kind"] == "speed":
            continue
        assert got.pop("kind") == expected.pop("kind")
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)
