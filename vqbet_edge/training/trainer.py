"""One run from the data set to the last checkpoint: a loop over two phases."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.markup import escape
from torch import Tensor

from vqbet_edge.cli import keeping_signals
from vqbet_edge.errors import DatasetError, UsageError, VQBeTEdgeError
from vqbet_edge.training.checkpoints import Checkpoints, DataFacts, Progress, Resumed
from vqbet_edge.training.codebooks import initialize, revive
from vqbet_edge.training.codes.cli import CodesConfig, text, write_report
from vqbet_edge.training.codes.phase1 import CodeReport, report_codes
from vqbet_edge.training.config import ACTION_KEY, TrainConfig, VQBeTConfig, crop_advice
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.joined import JoinedDataset
from vqbet_edge.training.evaluation.trials import Outcome, Trials
from vqbet_edge.training.feeding import Feeding, workers_named
from vqbet_edge.training.files import check_encodable
from vqbet_edge.training.layouts import lerobots_objections
from vqbet_edge.training.metrics import (
    Means,
    Pace,
    Reporter,
    check_tracker,
    draw_curves,
    overfitting,
    read_metrics,
    start_trackers,
)
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings, relative_advice
from vqbet_edge.training.phases import Phase, PolicyPhase, VqVaePhase
from vqbet_edge.training.pretrained import Beginning
from vqbet_edge.training.processes import (
    accelerate,
    any_process,
    batch_norm_advice,
    from_first,
    hosts,
    machine_first,
)
from vqbet_edge.training.windows import Mixture, Shuffle, WindowedDataset, current_frames

# Windows that k-means, revival and the reports on codes look at.
SAMPLE_WINDOWS = 4096
# So often phase 1's codes are looked at.
CODE_REPORTS = 20
# Dead codes are revived in this share of phase 1; the rest lets the codebooks settle.
REVIVAL_SHARE = 0.7
_LOWER = (
    "start a new run in another --output with a lower --optimizer-lr (phase 1: "
    "--optimizer-vqvae-lr)"
)


def train(config: TrainConfig) -> Path:
    """Train a policy in both phases, and return its directory.

    With `resume`, go on from the run's last checkpoint, bitwise as if it had never stopped (on the
    CPU).

    Raises:
        CheckpointError: the hyperparameters contradict each other, or the checkpoint that is
            resumed is not whole.
        DatasetError: the data set is corrupt or does not fit.
        UsageError: the configuration contradicts itself or the run that is resumed.
        DiskError: a checkpoint or the metrics cannot be written.
        KeyboardInterrupt: after SIGINT (TerminatedError: SIGTERM), with a checkpoint to resume
            from.
    """
    check_encodable(config.output)
    check_tracker(config.log_with)
    accelerator = accelerate(config)
    with machine_first(accelerator):  # which downloads
        dataset = _open(config)
    trainer = _Trainer(config, accelerator, dataset)
    trainer.run()
    accelerator.end_training()
    return trainer.checkpoints.last / "pretrained_model"


class _Trainer:
    """The loop, and how far it has come."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, dataset: LeRobotDataset
    ) -> None:
        self._config, self._accelerator = config, accelerator
        policy = config.policy(dataset)
        self._trials: Trials | None = None
        if config.eval_env is not None:
            self._trials = Trials.of(config.eval_env, config.eval_episodes, policy)
        beginning = Beginning.of(config, policy)
        self._pretrained = beginning.pretrained
        self._scalings = Scalings.of(dataset, policy, beginning.statistics)
        torch.manual_seed(config.seed)
        self.checkpoints = Checkpoints(config, self._scalings, DataFacts.of(dataset, policy))
        # The first process alone puts the run's folder in order; others may not see its disk.
        self._resumed = from_first(accelerator, self.checkpoints.start)
        if self._resumed is not None:  # the backbone's weights are in the checkpoint
            policy = replace(policy, pretrained_backbone_weights=None)
        with machine_first(accelerator):  # which downloads
            self._network = VQBeT(policy).to(accelerator.device)
        self._progress = self._resumed.progress if self._resumed else Progress()
        if self._resumed is not None:
            _load(self._network, self._resumed, config)
        elif self._pretrained is not None:
            self._pretrained.start(self._network)
        here = int(os.getenv("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
        feeding = Feeding.choose(config, dataset, policy.image_keys, here)
        self._data = WindowedDataset(
            dataset, policy, self._scalings, accelerator.device, feeding, self._check
        )
        split = dataset.split(config.validation_fraction, config.seed)
        frames = current_frames(dataset, split.train)
        # Of the first data set, which is looked at again in the end.
        self._kept = _of_part(dataset, split.validation, 0)
        self._shuffle = Shuffle(
            frames, config.batch_size, config.seed, _mixture(dataset, split.train, config)
        )
        order = np.random.default_rng(config.seed).permutation(len(frames))
        self._sample = self._data.chunks(frames[order[:SAMPLE_WINDOWS]]).flatten(0, 1)
        kept = current_frames(dataset, split.validation)
        firsts = range(0, len(kept), config.batch_size)
        self._validation = [kept[first : first + config.batch_size] for first in firsts]
        start_trackers(accelerator, config)
        self._reporter = Reporter(
            config, self._progress.step, accelerator.is_main_process, accelerator.log
        )
        self._received: list[KeyboardInterrupt] = []
        self._hosts = hosts(accelerator)
        if config.resume:
            self._reporter.note(_going_on(config, self._resumed))
        self._reporter.note(feeding.text(dataset, policy.image_keys))
        self._introduce(dataset, policy)

    def _introduce(self, dataset: LeRobotDataset, policy: VQBeTConfig) -> None:
        """Say what is noticed about the data."""
        left_out = dataset.chosen_cameras.left_out
        for key, what in left_out.items():
            self._reporter.note(f"left out: {key} ({what}); choose cameras with --cameras")
        if policy.resize_shape is None and left_out.keys() & set(dataset.image_keys):
            self._reporter.note("cameras of other sizes fit with --resize-shape HEIGHT WIDTH")
        for advice in self._scalings.advice:
            self._reporter.note(f"[yellow]{escape(advice)}")
        if advice := relative_advice(dataset, policy):
            self._reporter.note(advice)
        shards = batch_norm_advice(self._config, self._accelerator)
        for advice in filter(None, (crop_advice(policy), shards)):
            self._reporter.note(f"[yellow]{escape(advice)}")
        for reason in lerobots_objections(policy):
            self._reporter.note(f"LeRobot cannot load this policy's checkpoints: {reason}")

    def run(self) -> None:
        """Both phases, or what is left of them."""
        config = self._config
        first_steps = config.n_vqvae_training_steps
        parts = config, self._accelerator, self._network, self._data
        with self._reporter.bar, workers_named(), keeping_signals() as self._received:
            if self._progress.step < first_steps:
                if self._resumed is None and self._pretrained is None:
                    chunks = config.batch_size * self._network.config.num_queries
                    initialize(self._network.head.vqvae_model, self._sample, chunks)
                self._train(VqVaePhase(*parts), first_steps)
            elif self._progress.step == first_steps:
                self._resumed = None  # the optimiser in the checkpoint is phase 1's
                if self._pretrained is not None:
                    self._reporter.note(f"{self._pretrained}\n{self._codes()}")
            self._train(PolicyPhase(*parts, self._scalings), config.steps)
        if self._accelerator.is_main_process:
            records = read_metrics(config.output / "metrics.jsonl")
            draw_curves(records, config.output / "curves.png")
            if advice := overfitting(records):
                self._reporter.note(advice)
            # Of the policy as it was saved, on episodes kept for validation if there are.
            page = CodesConfig(
                policy=str(self.checkpoints.last / "pretrained_model"),
                data=config.source,
                output=config.output / "codes.html",
            )
            self._reporter.note(text(write_report(page, self._kept or None, config.episodes)))

    def _train(self, phase: Phase, end: int) -> None:
        """Go on with one phase up to step `end` of the run."""
        config = self._config
        now, device = self._progress, self._accelerator.device
        means, pace = Means((), 0, device), Pace(phase.name, config.batch_size, end - now.step)
        if self._resumed is not None:
            phase.restore(self._resumed)
            self._resumed = None
            means = Means(now.sums, now.summed, device)
        self._reporter.progress(now.step, phase.name)
        if self._due(phase) and now.driven != now.step:  # it was interrupted there
            self._drive()
            if self._told_to_stop():
                self._stop()
        steps = range(now.step, end)
        with closing(phase.batches(steps, self._shuffle)) as batches:
            while self._progress.step < end:
                self._step(phase, end, batches, means, pace)
                self._look(phase, end, means)

    def _check(self) -> None:
        """Stop before a step, when a signal has come."""
        if self._received:
            self._stop(", while frames were decoded")

    def _step(
        self,
        phase: Phase,
        end: int,
        batches: Iterator[Sequence[Tensor]],
        means: Means,
        pace: Pace,
    ) -> None:
        """One step of learning, and its line of the metrics where one is due."""
        done = self._progress.step + 1
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        means.add(phase.update(done - 1, batch))
        self._progress = replace(self._progress, step=done)
        due = done % self._config.log_every == 0 or done == end
        if due:
            self._log(phase, means.take(self._mean))
        if estimate := pace.add(time.perf_counter() - started, waited):
            self._reporter.note(estimate)
        if due:
            self._reporter.record(done, "speed", pace.take())

    def _look(self, phase: Phase, end: int, means: Means) -> None:
        """What is due after a step: codes, validation, episodes, a checkpoint, the end."""
        config, done = self._config, self._progress.step
        if isinstance(phase, VqVaePhase) and self._look_at_codes():
            self._progress = replace(self._progress, step=end)  # what is left is skipped
        last = self._progress.step == end
        if self._validation and (done % config.validate_every == 0 or last):
            found = phase.validate(self._validation)
            self._reporter.record(done, f"{phase.name} validation", found)
        stopping, due = self._told_to_stop(), self._due(phase)
        if done % config.save_every == 0 or last or stopping or due:
            self._progress = replace(self._progress, **means.kept(self._mean))
            self._save(phase)
        if due and not stopping:  # of what is saved: an environment may fail in any way
            self._drive()
            stopping = self._told_to_stop()
        if stopping and (done < config.steps or due):
            self._stop()

    def _stop(self, when: str = "") -> None:
        self._reporter.note(f"stopped after step {self._progress.step}{when}; go on with --resume")
        raise self._received[0] if self._received else KeyboardInterrupt

    def _mean(self, tensor: Tensor) -> Tensor:
        mean: Tensor = self._accelerator.reduce(tensor, "mean")
        return mean

    def _due(self, phase: Phase) -> bool:
        """Whether episodes are driven at this step."""
        config, step = self._config, self._progress.step
        if self._trials is None or not isinstance(phase, PolicyPhase):
            return False
        at_rest = step % config.eval_every == 0 or step == config.steps
        return at_rest and step > config.n_vqvae_training_steps

    def _drive(self) -> None:
        """Drive episodes on the first process, and judge the newest checkpoint by them."""
        outcome = [0.0] * len(Outcome._fields)
        interrupted = 0
        if self._trials is not None and self._accelerator.is_main_process:
            try:
                outcome = [*self._trials.drive(self.checkpoints.last / "pretrained_model")]
            except KeyboardInterrupt as interrupt:  # all processes learn it
                self._received.append(interrupt)
                interrupted = 1
        device = self._accelerator.device
        told = torch.tensor([*outcome, interrupted], device=device, dtype=torch.float64)
        *found, interrupted = self._accelerator.reduce(told, "sum").tolist()
        if interrupted:
            return
        success, max_reward, steps = found
        self._progress = self._progress.drove(success, max_reward)
        figures = {"success": success, "max_reward": max_reward, "episode_steps": steps}
        self._reporter.record(self._progress.step, "episodes", figures)
        self._reporter.note(
            f"step {self._progress.step}: {success:.0%} of {self._config.eval_episodes} episodes "
            f"in {self._config.eval_env} succeed, highest reward {max_reward:.3g}"
        )
        if self._accelerator.is_main_process:
            self.checkpoints.judged(self._progress)

    def _log(self, phase: Phase, means: list[float]) -> None:
        metrics = dict(zip(phase.names, means, strict=True))
        step = self._progress.step
        if not np.isfinite(metrics["loss"]):
            raise VQBeTEdgeError(f"the loss is {metrics['loss']} at step {step}; {_LOWER}")
        self._reporter.record(
            step, phase.name, {**metrics, "lr": phase.optimizer.param_groups[0]["lr"]}
        )
        self._reporter.progress(step, phase.name, metrics)

    def _look_at_codes(self) -> bool:
        """Report on the codes and revive dead ones when it is time; True ends phase 1 early."""
        config, step = self._config, self._progress.step
        total = config.n_vqvae_training_steps
        if step % max(1, total // CODE_REPORTS) and step != total:
            return False
        report = self._codes()
        self._reporter.record(step, "codes", report.metrics())
        self._progress = self._progress.seen(report.error)
        if step < REVIVAL_SHARE * total:
            revive(self._network.head.vqvae_model, self._sample)
        early = config.vqvae_early_stop and self._progress.converged
        if step == total and not self._progress.converged:
            self._reporter.note(
                f"[yellow]phase 1 was still learning after {total} steps (error "
                f"{report.error:.4f}); raise --n-vqvae-training-steps"
            )
        if step == total or early:
            self._reporter.note(str(report))
        return early

    def _codes(self) -> CodeReport:
        vqvae = self._network.head.vqvae_model
        return report_codes(vqvae, self._sample, self._scalings.backward[ACTION_KEY].multiply)

    def _save(self, phase: Phase) -> None:
        networks = filter(None, (self._network, phase.averaged))
        tensors = [tensor for network in networks for tensor in network.state_dict().values()]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise VQBeTEdgeError(
                f"weights are not finite at step {self._progress.step}, and are not saved; {_LOWER}"
            )
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            optimizer = phase.optimizer.state_dict()
            self.checkpoints.save(self._progress, self._network, phase.averaged, optimizer)

    def _told_to_stop(self) -> bool:
        """Whether any process received a signal; all learn it at the same step."""
        told = bool(self._received)
        return any_process(told, self._hosts)


def _open(config: TrainConfig) -> LeRobotDataset:
    opened = [
        LeRobotDataset.open(
            source,
            cameras=config.cameras,
            cache_dir=config.frame_cache,
            resize_shape=config.resize_shape,
            episodes=config.episodes if number == 0 else None,
        )
        for number, source in enumerate((config.source, *config.more_datasets))
    ]
    return opened[0] if len(opened) == 1 else JoinedDataset(opened)


def _of_part(dataset: LeRobotDataset, episodes: tuple[int, ...], number: int) -> tuple[int, ...]:
    """Those of some episodes that are from one of the data sets."""
    parts = dataset.parts
    return tuple(i for i in episodes if parts[i] == number)


def _mixture(
    dataset: LeRobotDataset, train: tuple[int, ...], config: TrainConfig
) -> Mixture | None:
    if config.dataset_weights is None:
        return None
    numbers = range(len(config.dataset_weights))
    frames = [current_frames(dataset, _of_part(dataset, train, number)) for number in numbers]
    for number, own in enumerate(frames):
        if not len(own):
            source = (config.dataset, *config.more_datasets)[number]
            raise DatasetError(
                f"no episode of {source} is left to train on; lower --validation-fraction, or "
                "leave --dataset-weights out"
            )
    return Mixture(tuple(frames), config.dataset_weights)


def _load(network: VQBeT, resumed: Resumed, config: TrainConfig) -> None:
    try:
        network.load_state_dict(resumed.weights)
    except RuntimeError as e:
        raise UsageError(
            f"{resumed.path} does not fit the cameras, states and actions of {config.dataset}; "
            f"pass the data set that the run was started with ({' '.join(str(e).split())[:300]})"
        ) from e


def _going_on(config: TrainConfig, resumed: Resumed | None) -> str:
    if resumed is None:
        return f"no checkpoint in {config.output} yet: beginning at step 0"
    text = f"going on from step {resumed.progress.step} ({resumed.path})"
    if resumed.steps == config.steps:
        return text
    return (
        f"{text}; the run was to have {resumed.steps} steps and now has {config.steps}: phase 2's "
        "learning rate goes on where the longer run's would be, so it may rise once"
    )
