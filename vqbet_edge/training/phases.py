"""The two phases of training: what each learns from, with which optimiser and learning rate."""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import nullcontext
from itertools import tee
from typing import Any, TypeAlias, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqbet_edge.training.augmentation import Augmentation
from vqbet_edge.training.checkpoints import Resumed
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset.table import Indices
from vqbet_edge.training.draws import Shard
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.objectives import (
    PolicyLosses,
    PolicyObjective,
    VqVaeLosses,
    VqVaeObjective,
)
from vqbet_edge.training.windows import Shuffle, WindowedDataset

Losses: TypeAlias = VqVaeLosses | PolicyLosses


class Phase(ABC):
    """One half of training."""

    name: str  # in metrics and messages
    accumulation = 1  # parts of a batch whose gradients are summed
    _averaged: AveragedModel | None = None

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        network: VQBeT,
        objective: VqVaeObjective | PolicyObjective,
        groups: list[dict[str, Any]],
    ) -> None:
        self._config, self._accelerator, self._network = config, accelerator, network
        optimizer = Adam(
            groups,
            lr=config.optimizer_lr,
            betas=config.optimizer_betas,
            eps=config.optimizer_eps,
            fused=True,
        )
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.names: Sequence[str] = objective.names
        self._objective, self.optimizer = accelerator.prepare(objective, optimizer)

    def batches(self, steps: Iterable[int], shuffle: Shuffle) -> Generator[Sequence[Tensor]]:
        """What this process learns from in some steps of the run, its rows of every batch."""
        own, ahead = tee(steps)
        rows = self._own(shuffle.batch_size).rows
        return self._batches((shuffle.batch(step)[rows] for step in ahead), own)

    @abstractmethod
    def _batches(
        self, windows: Iterable[Indices], steps: Iterable[int] | None = None
    ) -> Generator[Sequence[Tensor]]:
        """What the objective takes of windows, int64 (B,) each, and in which steps of learning."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step of the whole run."""

    @property
    def averaged(self) -> VQBeT | None:
        """The network with the moving average of its weights, if one is kept."""
        return None if self._averaged is None else cast("VQBeT", self._averaged.module)

    def restore(self, resumed: Resumed) -> None:
        """Take the optimiser and the moving average from a checkpoint of this phase."""
        self.optimizer.load_state_dict(resumed.optimizer)
        if self._averaged is not None and resumed.averaged is not None:
            self._averaged.module.load_state_dict(resumed.averaged)
            self._averaged.n_averaged.fill_(1)

    def update(self, step: int, batch: Sequence[Tensor]) -> Losses:
        """One optimisation step on this process's rows of a batch.

        All that is random in it follows from seed, step and sample.
        """
        accelerator = self._accelerator
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self._objective.train()
        seed = hash((self._config.seed, step, 0)) % 2**63
        losses = self._backward(batch, self._own(self._config.batch_size), seed)
        clip = self._config.optimizer_grad_clip_norm
        accelerator.clip_grad_norm_(self._objective.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._averaged is not None:
            self._averaged.update_parameters(self._network)
        return losses

    def _backward(self, batch: Sequence[Tensor], own: Shard, seed: int) -> Losses:
        """Gradients of this process's rows, and their mean losses."""
        found, count = [], self.accumulation
        for part in (own.part(index, count) for index in range(count)):
            torch.manual_seed(seed)  # every part draws what is random for the whole batch
            rows = slice(part.start - own.start, part.stop - own.start)
            some = batch if count == 1 else tuple(tensor[rows] for tensor in batch)
            last = part.stop == own.stop
            with nullcontext() if last else self._accelerator.no_sync(self._objective):
                losses = self._losses(self._objective, some, part)
                self._accelerator.backward(losses.loss / count)
            found.append(losses)
        means = (torch.stack(values).detach().mean(0) for values in zip(*found, strict=True))
        return type(found[0])(*means)

    @torch.no_grad()
    def validate(self, batches: Iterable[Indices]) -> dict[str, float]:
        """Mean losses of the weights that a checkpoint would hold."""
        torch.manual_seed(self._config.seed)
        self._objective.eval()
        current = {name: value.clone() for name, value in self._network.state_dict().items()}
        self._network.load_state_dict((self.averaged or self._network).state_dict())
        means = self._means(batches)
        self._network.load_state_dict(current)
        return means

    def _means(self, batches: Iterable[Indices]) -> dict[str, float]:
        """Over the frames of all processes."""
        objective = self._accelerator.unwrap_model(self._objective)
        sums = torch.zeros(1 + len(objective.names), device=self._accelerator.device)
        parts = list(batches)
        own = [self._own(len(frames)) for frames in parts]
        # Who has none of a short batch computes one that does not count: all draw alike.
        some = [shard._replace(stop=max(shard.stop, shard.start + 1)) for shard in own]
        rows = (frames[shard.rows] for frames, shard in zip(parts, some, strict=True))
        for counted, shard, batch in zip(own, some, self._batches(rows), strict=True):
            losses = self._losses(objective, batch, shard)
            values = [torch.ones_like(losses.loss), *losses._asdict().values()]
            sums += counted.size * torch.stack(values)
        count, *totals = _sum(self._accelerator, sums).tolist()
        return {n: t / count for n, t in zip(objective.names, totals, strict=True)}

    def _own(self, size: int) -> Shard:
        """This process's rows of a batch."""
        accelerator = self._accelerator
        whole = Shard(0, size, size)
        return whole.part(accelerator.process_index, accelerator.num_processes)

    def _losses(self, objective: nn.Module, batch: Sequence[Tensor], shard: Shard) -> Losses:
        mixed = self._config.mixed_precision == "bf16"
        with torch.autocast(self._accelerator.device.type, torch.bfloat16, enabled=mixed):
            losses: Losses = objective(*batch, shard if shard.size < shard.whole else None)
        return losses


class VqVaePhase(Phase):
    """Phase 1: the residual VQ-VAE, from actions alone."""

    name = "phase 1"

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, network: VQBeT, data: WindowedDataset
    ) -> None:
        self._data = data
        vqvae = network.head.vqvae_model.requires_grad_(True)
        group = {
            "params": list(vqvae.parameters()),
            "lr": config.optimizer_vqvae_lr,
            "weight_decay": config.optimizer_vqvae_weight_decay,
        }
        objective = VqVaeObjective(vqvae, lambda tensor: _sum(accelerator, tensor))
        super().__init__(config, accelerator, network, objective, [group])

    def _batches(
        self,
        windows: Iterable[Indices],
        steps: Iterable[int] | None = None,  # noqa: ARG002
    ) -> Generator[Sequence[Tensor]]:
        """Every query's action chunk."""
        for frames in windows:
            yield (self._data.chunks(frames).flatten(0, 1),)

    def rate(self, step: int) -> float:  # noqa: ARG002
        """Constant, as in LeRobot's `VQBeTSchedulerConfig`."""
        return 1.0


class PolicyPhase(Phase):
    """Phase 2: everything else, with the VQ-VAE frozen, buffers and all."""

    name = "phase 2"

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        network: VQBeT,
        data: WindowedDataset,
        scalings: Scalings,
    ) -> None:
        self._data = data
        self._augmentation: Augmentation | None = None
        if config.image_transforms.enable:
            self._augmentation = Augmentation(config.image_transforms, config.seed)
        vqvae = network.head.vqvae_model.requires_grad_(False)
        # Marked as learned and frozen, as in LeRobot's checkpoints.
        vqvae.discretized.fill_(True)
        vqvae.vq_layer.freeze_codebook.fill_(True)
        self.accumulation = config.gradient_accumulation_steps
        each = config.crop_per_sample
        objective = PolicyObjective(network, scalings, crop_per_sample=each)
        objective.to(accelerator.device)
        if config.compile:
            objective.compile()
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self._averaged = AveragedModel(network, multi_avg_fn=average)
        groups = parameter_groups(network, config.optimizer_weight_decay)
        super().__init__(config, accelerator, network, objective, groups)

    def _batches(
        self, windows: Iterable[Indices], steps: Iterable[int] | None = None
    ) -> Generator[Sequence[Tensor]]:
        """Images, states and chunks; while learning, pictures are changed at random."""
        if self._augmentation is None or steps is None:
            yield from self._data.batches(windows)
            return
        own, fed = tee(windows)
        for step, frames, batch in zip(steps, own, self._data.batches(fed), strict=False):
            yield batch._replace(images=self._augmentation(batch.images, step, frames))

    def rate(self, step: int) -> float:
        """Warm-up, then a cosine that reaches its end with the run.

        LeRobot's `VQBeTSchedulerConfig` divides by the steps of both phases, so that its cosine
        ends early in its course.
        """
        done = step - self._config.n_vqvae_training_steps
        warmup = self._config.scheduler_warmup_steps
        if done < warmup:
            return done / warmup
        steps = self._config.steps - self._config.n_vqvae_training_steps
        progress = (done - warmup) / max(1, steps - 1 - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(network: VQBeT, weight_decay: float) -> list[dict[str, Any]]:
    """Phase 2's groups: as in LeRobot, only the GPT's biases, norms and embeddings do not decay."""
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = isinstance(module, nn.LayerNorm | nn.Embedding) or name.endswith("bias")
            exempt = kept and f"{prefix}.".startswith("vqbet.policy.")
            if parameter.requires_grad:
                (others if exempt else decaying).append(parameter)
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    total: Tensor = accelerator.reduce(tensor, reduction="sum")
    return total
