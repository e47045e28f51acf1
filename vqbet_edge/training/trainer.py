"""One run from the data set to the last checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator

from vqbet_edge.cli import TerminatedError
from vqbet_edge.errors import UsageError
from vqbet_edge.training.checkpoints import Checkpoints, Progress, Resumed
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.curves import draw_code_book, draw_curves
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.loop import run_stage, start_stage
from vqbet_edge.training.metrics import Reporter
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.run import Run
from vqbet_edge.training.stages import (
    PolicyStage,
    VqVaeStage,
    finish_code_books,
    learned_code_books,
)
from vqbet_edge.training.windows import Indices, Shuffle, WindowedDataset, current_frames

VALIDATION_BATCHES = 8


def train(config: TrainConfig) -> Path:
    """Train a policy in both stages.

    Args:
        config: the run; with `resume`, goes on from its last checkpoint, bitwise as if it had
            never stopped (on the CPU).

    Returns:
        The directory of the trained policy.

    Raises:
        DatasetError: the data set is corrupt or does not fit.
        UsageError: the configuration contradicts itself or the run that is resumed.
        DiskError: a checkpoint or the metrics cannot be written.
        KeyboardInterrupt: after SIGINT (TerminatedError: SIGTERM), with a checkpoint to resume
            from.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if config.batch_size % accelerator.num_processes:
        raise UsageError(
            f"--batch_size {config.batch_size} is not a multiple of the "
            f"{accelerator.num_processes} processes"
        )
    with accelerator.main_process_first():
        dataset = LeRobotDataset.open(config.dataset, cache_dir=config.frame_cache)
    policy = config.policy(dataset)
    scalings = Scalings.of(dataset, policy)
    torch.manual_seed(config.seed)
    network = VQBeT(policy).to(accelerator.device)
    checkpoints = Checkpoints(config, dataset)
    resumed = checkpoints.start()
    if resumed is not None:
        network.load_state_dict(resumed.weights)
    split = dataset.split(config.validation_fraction, config.seed)
    progress = resumed.progress if resumed else Progress()
    run = Run(
        config=config,
        accelerator=accelerator,
        network=network,
        scalings=scalings,
        data=WindowedDataset(dataset, policy, scalings, accelerator.device),
        shuffle=Shuffle(current_frames(dataset, split.train), config.batch_size, config.seed),
        validation=_validation(current_frames(dataset, split.validation), config),
        checkpoints=checkpoints,
        reporter=Reporter(config, progress.step, accelerator.is_main_process),
        progress=progress,
    )
    with run.reporter, _stop_on_signal(run):
        _both_stages(run, resumed)
    accelerator.end_training()
    return checkpoints.last / "pretrained_model"


def _both_stages(run: Run, resumed: Resumed | None) -> None:
    config = run.config
    if run.progress.step < config.n_vqvae_training_steps:
        stage = VqVaeStage(config, run.accelerator, run.network, run.data)
        if resumed is None:
            learned_code_books(config, run.network, run.data, run.sample())
        start_stage(stage, resumed, run)
        run_stage(run, stage, config.n_vqvae_training_steps)
        resumed = None
    if run.progress.step == config.n_vqvae_training_steps:
        resumed = None  # the optimiser in the checkpoint is stage 1's
        finish_code_books(run.network)
    policy = PolicyStage(config, run.accelerator, run.network, run.data, run.scalings)
    start_stage(policy, resumed, run)
    run_stage(run, policy, config.steps)
    if run.accelerator.is_main_process:
        draw_curves(run.reporter.path, config.output / "curves.png")
        draw_code_book(run.network, run.scalings, config.output / "code_book.png")


def _validation(frames: Indices, config: TrainConfig) -> list[Indices]:
    shuffled = np.random.default_rng(config.seed).permutation(frames)
    size = config.batch_size
    return [shuffled[i : i + size] for i in range(0, len(shuffled), size)][:VALIDATION_BATCHES]


@contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops at the end of the step, the second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        interrupt = TerminatedError() if number == signal.SIGTERM else KeyboardInterrupt()
        if run.stopping is not None:
            raise interrupt
        run.stopping = interrupt

    # Python delivers signals to the main thread only.
    own = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if own else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
