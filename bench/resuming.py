"""Losses of 1, 2 and 4 processes, of every way to feed frames, stopped and resumed at ten places.

    python bench/resuming.py tests/data/pusht --output resuming.json

A run of twenty steps on the CPU (gloo), with dropout, crops per sample and sampled codes; each is
compared with one that was never stopped, in one process, with its frames in memory.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tyro
from accelerate import PartialState
from torch import Tensor
from vqbet_bench.machine import vector_units

from vqbet_edge.training import trainer
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.phases import Phase
from vqbet_edge.training.recipes import RECIPES

PROCESSES = 1, 2, 4
PLACES = range(0, 20, 2)
WAYS: dict[str, dict[str, Any]] = {
    "in memory": {"stream_frames": False},
    "cache": {},
    "on the way, 2 workers": {"stream_frames": True, "num_workers": 2},
}
CHOSEN: dict[str, Any] = {
    **RECIPES["small"],
    "use_group_norm": True,
    "crop_per_sample": True,
    "ema_decay": 0.5,
    "batch_size": 8,
    "steps": 20,
    "n_vqvae_training_steps": 10,
    "scheduler_warmup_steps": 2,
    "log_every": 1,
    "save_every": 3,
    "validate_every": 5,
    "validation_fraction": 0.25,
}
Losses = dict[str, float]


def losses(folder: Path) -> Losses:
    """All that a run's metrics say but how fast it went."""
    return {
        f"{record['kind']}, step {record['step']}, {name}": value
        for record in read_metrics(folder / "metrics.jsonl")
        if record["kind"] != "speed"
        for name, value in record.items()
        if isinstance(value, float)
    }


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """A signal in the middle of that step."""
    update = Phase.update

    def stopping(self: Phase, number: int, batch: Sequence[Tensor]) -> Tensor:
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return update(self, number, batch)

    Phase.update = stopping  # type: ignore[method-assign]
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        Phase.update = update  # type: ignore[method-assign]


def one_group(dataset: str, folder: Path) -> None:
    """All runs of this number of processes, of which this is one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("write_report", "draw_curves", "text"):
        setattr(trainer, name, lambda *_: "")
    for way, feeding in WAYS.items():
        for step in (None, *PLACES):
            output = folder / way / str(step)
            chosen = {**CHOSEN, **feeding, "dataset": dataset, "output": output}
            if way == "cache":
                chosen["frame_cache"] = folder / "frames"
            if step is not None:
                with stopped_at(step):
                    trainer.train(TrainConfig(**chosen))
                    raise RuntimeError("it was not stopped")
            trainer.train(TrainConfig(**chosen, resume=step is not None))
            if PartialState().is_main_process:
                (output / "losses.json").write_text(json.dumps(losses(output)))
                shutil.rmtree(output / "checkpoints")
            PartialState().wait_for_everyone()


def start(count: int, dataset: str, folder: Path) -> None:
    """So many processes that know of each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--master-port", "0", __file__, dataset, "--folder", str(folder)]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=os.environ | environment, check=True)  # noqa: S603


def difference(found: Losses, expected: Losses) -> float:
    """The largest one, as a share of what is expected."""
    if found.keys() != expected.keys():
        raise RuntimeError(f"other lines: {sorted(found.keys() ^ expected.keys())}")
    return max(abs(found[k] - v) / max(abs(v), 1e-6) for k, v in expected.items())


def main(dataset: str, /, output: Path = Path("resuming.json"), folder: Path | None = None) -> None:
    """Write the table; with `folder`, this process is one of a group's."""
    if folder is not None:
        one_group(dataset, folder)
        return
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for count in PROCESSES:
            start(count, dataset, Path(temporary) / str(count))
        read = {
            (count, way, place): json.loads(
                (Path(temporary) / str(count) / way / str(place) / "losses.json").read_text()
            )
            for count in PROCESSES
            for way in WAYS
            for place in (None, *PLACES)
        }
    plain = read[1, "in memory", None]
    for count in PROCESSES:
        for way in WAYS:
            whole = read[count, way, None]
            table[f"{count} processes, {way}"] = {
                "never stopped, beside one process in memory": difference(whole, plain),
                "stopped and resumed, beside never stopped": max(
                    difference(read[count, way, place], whole) for place in PLACES
                ),
            }
    result = {"machine": vector_units(), "places": list(PLACES), "largest relative": table}
    output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(output.read_text())


if __name__ == "__main__":
    tyro.cli(main)
