"""One run from the data set to the last checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vqbet_edge.data import LeRobotDataset
from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.model.config import ACTION_KEY
from vqbet_edge.model.network import VQBeT
from vqbet_edge.training.checkpoints import Checkpoints, Progress, Resumed
from vqbet_edge.training.codebooks import revive
from vqbet_edge.training.codes import CodeReport, report_codes
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.curves import draw_code_book, draw_curves
from vqbet_edge.training.metrics import Reporter
from vqbet_edge.training.scalings import Scalings
from vqbet_edge.training.stages import (
    PolicyStage,
    Stage,
    VqVaeStage,
    finish_code_books,
    learned_code_books,
)
from vqbet_edge.training.windows import Indices, Shuffle, WindowedDataset, current_frames

# Stage 1 is looked at so often, and has converged when an interval wins less than this.
STAGE1_INTERVALS = 20
CONVERGED = 0.01
# Dead codes are revived in this share of stage 1; the rest lets the code books settle.
REVIVAL_SHARE = 0.7
# Windows that k-means, revival and the reports look at.
SAMPLE_WINDOWS = 4096
VALIDATION_BATCHES = 8


@dataclass
class Run:
    """Everything that the loop needs, and how far it has come."""

    config: TrainConfig
    accelerator: Accelerator
    network: VQBeT
    scalings: Scalings
    data: WindowedDataset
    shuffle: Shuffle
    validation: list[Indices]
    checkpoints: Checkpoints
    reporter: Reporter
    progress: Progress
    stopping: bool = False

    def share(self, frames: Indices) -> Indices:
        """This process's part of a batch."""
        own: Indices = np.array_split(frames, self.accelerator.num_processes)[
            self.accelerator.process_index
        ]
        return own


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
        KeyboardInterrupt: after SIGINT or SIGTERM, with a checkpoint to resume from.
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
            learned_code_books(config, run.network, run.data, _sample(run))
        _start(stage, resumed, run)
        _loop(run, stage, config.n_vqvae_training_steps)
        resumed = None
    if run.progress.step == config.n_vqvae_training_steps:
        resumed = None  # the optimiser in the checkpoint is stage 1's
        finish_code_books(run.network)
    policy = PolicyStage(config, run.accelerator, run.network, run.data, run.scalings)
    _start(policy, resumed, run)
    _loop(run, policy, config.steps)
    if run.accelerator.is_main_process:
        draw_curves(run.reporter.path, config.output / "curves.png")
        draw_code_book(run.network, run.scalings, config.output / "code_book.png")


def _start(stage: Stage, resumed: Resumed | None, run: Run) -> None:
    for group in stage.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if resumed is not None:
        stage.optimizer.load_state_dict(resumed.optimizer)
        if stage.averaged is not None and resumed.averaged is not None:
            stage.averaged.module.load_state_dict(resumed.averaged)
            stage.averaged.n_averaged.fill_(1)
    run.reporter.progress(run.progress.step, stage.name)


def _loop(run: Run, stage: Stage, end: int) -> None:
    """Train one stage up to step `end` of the run."""
    config = run.config
    saved = run.progress.step
    while run.progress.step < end:
        step = run.progress.step
        losses = _update(run, stage, step)
        done = step + 1
        run.progress = replace(run.progress, step=done)
        if done % config.log_every == 0 or done == end:
            _log(run, stage, losses)
        if stage.name == VqVaeStage.name and _looked_at_codes(run, done):
            end = done
        if done % config.validate_every == 0 or done == end:
            _validate(run, stage)
        stopping = _agreed(run)
        if done % config.save_every == 0 or done == end or stopping:
            if done == end and stage.name == VqVaeStage.name:
                run.progress = replace(run.progress, step=config.n_vqvae_training_steps)
            _save(run, stage)
            saved = done
        if stopping and done < config.steps:
            raise KeyboardInterrupt(f"stopped at step {saved}; go on with --resume")


def _update(run: Run, stage: Stage, step: int) -> dict[str, Tensor]:
    """One optimisation step; all that is random in it follows from seed, step and process."""
    config = run.config
    torch.manual_seed(hash((config.seed, step, run.accelerator.process_index)) % 2**63)
    rate = stage.rate(step)
    for group in stage.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate
    stage.objective.train()
    with run.accelerator.autocast():
        losses = stage.losses(run.share(run.shuffle.batch(step)))
    run.accelerator.backward(losses.loss)
    run.accelerator.clip_grad_norm_(stage.objective.parameters(), config.optimizer_grad_clip_norm)
    stage.optimizer.step()
    stage.optimizer.zero_grad()
    if stage.averaged is not None:
        stage.averaged.update_parameters(run.network)
    return losses._asdict()


def _log(run: Run, stage: Stage, losses: dict[str, Tensor]) -> None:
    means = run.accelerator.reduce(torch.stack([v.detach() for v in losses.values()]), "mean")
    metrics = dict(zip(losses, means.tolist(), strict=True))
    if not np.isfinite(metrics["loss"]):
        raise VQBeTEdgeError(
            f"the loss is {metrics['loss']} at step {run.progress.step}; lower the learning rate "
            "and go on from an earlier checkpoint with --resume"
        )
    rate = stage.optimizer.param_groups[0]["lr"]
    run.reporter.record(run.progress.step, stage.name, {**metrics, "lr": rate})
    run.reporter.progress(run.progress.step, stage.name, metrics)


def _looked_at_codes(run: Run, done: int) -> bool:
    """Report on the codes when it is time; True when stage 1 may end early."""
    total = run.config.n_vqvae_training_steps
    if done % max(1, total // STAGE1_INTERVALS) and done != total:
        return False
    report = _report(run)
    run.reporter.record(done, "codes", report.metrics())
    before, error = run.progress.error, report.error
    converged = before is not None and error > before * (1 - CONVERGED)
    run.progress = replace(run.progress, error=error)
    if done < REVIVAL_SHARE * total:
        revived = revive(run.network.head.vqvae_model, run.data.chunks(_sample(run)))
        converged = converged and not revived
    if done == total and not converged:
        run.reporter.note(
            f"[yellow]stage 1 has not converged in {total} steps: its error is {error:.4f}, "
            f"{before or 0:.4f} an interval earlier; raise --n_vqvae_training_steps"
        )
    if done == total or (converged and run.config.vqvae_early_stop):
        run.reporter.note(_sentence(report))
    return converged and run.config.vqvae_early_stop


def _report(run: Run) -> CodeReport:
    unit = run.scalings.unit(ACTION_KEY)
    return report_codes(run.network.head.vqvae_model, run.data.chunks(_sample(run)), unit)


def _sentence(report: CodeReport) -> str:
    errors = ", ".join(f"{value:.3g}" for value in report.error_in_units)
    used, perplexity = report.used, report.perplexity
    return (
        f"codes: reconstruction error {errors} in the action's units; "
        f"{used[0]} + {used[1]} codes used, perplexity {perplexity[0]:.1f} + {perplexity[1]:.1f}, "
        f"{report.pairs} code pairs in use"
    )


def _sample(run: Run) -> Indices:
    """The windows that the code books are looked at with, the same all along the run."""
    frames = run.shuffle.frames
    chosen = np.random.default_rng(run.config.seed).permutation(len(frames))[:SAMPLE_WINDOWS]
    return frames[chosen]


@torch.no_grad()
def _validate(run: Run, stage: Stage) -> None:
    if not run.validation:
        return
    torch.manual_seed(run.config.seed)
    stage.objective.eval()
    own = stage.averaged
    current = {k: v.clone() for k, v in run.network.state_dict().items()} if own else {}
    if own is not None:
        run.network.load_state_dict(own.module.state_dict())
    with run.accelerator.autocast():
        found = [stage.losses(run.share(frames))._asdict() for frames in run.validation]
    if own is not None:
        run.network.load_state_dict(current)
    means = {name: float(torch.stack([f[name] for f in found]).mean()) for name in found[0]}
    run.reporter.record(run.progress.step, f"{stage.name} validation", means)


def _validation(frames: Indices, config: TrainConfig) -> list[Indices]:
    shuffled = np.random.default_rng(config.seed).permutation(frames)
    size = config.batch_size
    return [shuffled[i : i + size] for i in range(0, len(shuffled), size)][:VALIDATION_BATCHES]


def _save(run: Run, stage: Stage) -> None:
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        averaged = None if stage.averaged is None else cast("VQBeT", stage.averaged.module)
        run.checkpoints.save(run.progress, run.network, averaged, stage.optimizer.state_dict())


def _agreed(run: Run) -> bool:
    """Whether any process was told to stop; all learn it at the same step."""
    if run.accelerator.num_processes == 1:
        return run.stopping
    flag = torch.tensor(int(run.stopping), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum"))


@contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops at the end of the step, the second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
