"""Camera frames from videos: our processes that decode on the way, beside LeRobot's own loader.

usage: python bench/frames.py DATASET [--batch N] [--observations N] [--workers N] [--seconds S]
Needs LeRobot. Opens the data set, then both in turns, each from a start of its own; prints samples
a second, and the memory of all processes (proportional set size: shared pages count once).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from vqbet_bench.machine import vector_units
from vqbet_bench.serving import pss_mb

from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.feeding import Feeding
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.windows import Shuffle, WindowedDataset

TURNS = 3


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    for name, value in {"batch": 64, "observations": 5, "workers": 2, "seconds": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    start = time.perf_counter()
    data = LeRobotDataset.open(arguments.dataset)
    opened = {"ours": time.perf_counter() - start}
    start = time.perf_counter()
    reference = _reference(arguments, data)
    opened["LeRobot"] = time.perf_counter() - start
    loaders: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: _ours(arguments, data),
        "LeRobot": lambda: _theirs(arguments, reference),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    memory = dict.fromkeys(loaders, 0.0)
    for _ in range(TURNS):
        for name, loader in loaders.items():
            rate, most = _measure(loader(), arguments.batch, arguments.seconds)
            rates[name].append(rate)
            memory[name] = max(memory[name], most)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    report = {
        "opening, s": opened,
        "samples a second": rates,
        "ratio": middle["ours"] / middle["LeRobot"],
        "memory of all processes, MiB": memory,
        "instruction sets": vector_units(Path("/proc/cpuinfo")),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _ours(arguments: argparse.Namespace, data: LeRobotDataset) -> Iterator[Any]:
    config = TrainConfig(
        dataset=arguments.dataset, output=Path("unused"), n_obs_steps=arguments.observations
    )
    policy = config.policy(data)
    way, device = Feeding("stream", arguments.workers), torch.device("cpu")
    windows = WindowedDataset(data, policy, Scalings.of(data, policy), device, way)
    shuffle = Shuffle(np.arange(data.num_frames), arguments.batch, seed=0)
    return windows.batches(map(shuffle.batch, count()))


def _reference(arguments: argparse.Namespace, data: LeRobotDataset) -> Any:  # noqa: ANN401
    from lerobot.datasets.lerobot_dataset import LeRobotDataset as Reference  # noqa: PLC0415

    seconds = [
        (step - arguments.observations + 1) / data.fps for step in range(arguments.observations)
    ]
    wanted = dict.fromkeys(data.image_keys, seconds)
    return Reference("local/data", root=arguments.dataset, delta_timestamps=wanted)


def _theirs(arguments: argparse.Namespace, reference: Any) -> Iterator[Any]:  # noqa: ANN401
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        reference, batch_size=arguments.batch, shuffle=True, num_workers=arguments.workers
    )
    return iter(loader)


def _measure(batches: Iterator[Any], size: int, seconds: float) -> tuple[float, float]:
    """Samples a second behind the first batch, and the most memory, MiB."""
    next(batches)
    start, count, most = time.perf_counter(), 0, 0.0
    while time.perf_counter() - start < seconds:
        try:
            next(batches)
        except StopIteration:
            break
        count += size
        most = max(most, _memory())
    return count / (time.perf_counter() - start), most


def _memory() -> float:
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            total += pss_mb(process.pid)
    return total


if __name__ == "__main__":
    main()
