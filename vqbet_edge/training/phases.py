"""The two phases of training: what each learns from, with which optimiser and learning rate."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqbet_edge.training.augmentation import Augmentation
from vqbet_edge.training.checkpoints import Resumed
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.objectives import (
    PolicyLosses,
    PolicyObjective,
    VqVaeLosses,
    VqVaeObjective,
)
from vqbet_edge.training.windows import Indices, WindowedDataset

Losses: TypeAlias = VqVaeLosses | PolicyLosses


class Phase(ABC):
    """One half of training."""

    name: str  # in metrics and messages
    waited = 0.0  # seconds for data, so far
    _step: int | None = None  # that is trained on; None while validating
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

    @abstractmethod
    def batch(self, frames: Indices) -> tuple[Tensor, ...]:
        """What the objective takes for the windows that end at `frames` (B,)."""

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

    def update(self, step: int, frames: Indices) -> Losses:
        """One optimisation step; all that is random in it follows from seed, step and process."""
        accelerator = self._accelerator
        torch.manual_seed(hash((self._config.seed, step, accelerator.process_index)) % 2**63)
        self._step = step
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self._objective.train()
        losses = self._losses(self._objective, self._own(frames))
        accelerator.backward(losses.loss)
        clip = self._config.optimizer_grad_clip_norm
        accelerator.clip_grad_norm_(self._objective.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._averaged is not None:
            self._averaged.update_parameters(self._network)
        return losses

    @torch.no_grad()
    def validate(self, batches: Iterable[Indices]) -> dict[str, float]:
        """Mean losses of the weights that a checkpoint would hold."""
        torch.manual_seed(self._config.seed)
        self._step = None
        self._objective.eval()
        current = {name: value.clone() for name, value in self._network.state_dict().items()}
        self._network.load_state_dict((self.averaged or self._network).state_dict())
        means = self._means(batches)
        self._network.load_state_dict(current)
        return means

    def _means(self, batches: Iterable[Indices]) -> dict[str, float]:
        """Over the frames of all processes; the last batch may leave one without any."""
        objective = self._accelerator.unwrap_model(self._objective)
        sums = torch.zeros(1 + len(objective.names), device=self._accelerator.device)
        for own in filter(len, map(self._own, batches)):
            losses = self._losses(objective, own)
            values = [torch.ones_like(losses.loss), *losses._asdict().values()]
            sums += len(own) * torch.stack(values)
        count, *totals = _sum(self._accelerator, sums).tolist()
        return {n: t / count for n, t in zip(objective.names, totals, strict=True)}

    def _own(self, frames: Indices) -> Indices:
        """This process's part."""
        accelerator = self._accelerator
        own: Indices = np.array_split(frames, accelerator.num_processes)[accelerator.process_index]
        return own

    def _losses(self, objective: nn.Module, frames: Indices) -> Losses:
        started = time.perf_counter()
        batch = self.batch(frames)
        self.waited += time.perf_counter() - started
        with self._accelerator.autocast():
            losses: Losses = objective(*batch)
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

    def batch(self, frames: Indices) -> tuple[Tensor, ...]:
        """Every query's action chunk."""
        return (self._data.chunks(frames).flatten(0, 1),)

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
        objective = PolicyObjective(network, scalings).to(accelerator.device)
        if config.compile:
            objective.compile()
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self._averaged = AveragedModel(network, multi_avg_fn=average)
        groups = parameter_groups(network, config.optimizer_weight_decay)
        super().__init__(config, accelerator, network, objective, groups)

    def batch(self, frames: Indices) -> tuple[Tensor, ...]:
        """Images, states and chunks."""
        batch = self._data.batch(frames)
        if self._augmentation is None or self._step is None:
            return batch
        return batch._replace(images=self._augmentation(batch.images, self._step, frames))

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
