"""The two stages: what each trains, on what, with which optimiser and learning rate."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqbet_edge.training.codebooks import initialize
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.objectives import Stage1, Stage2
from vqbet_edge.training.windows import Indices, WindowedDataset


class Losses(Protocol):
    """A named tuple of scalars, the total first."""

    @property
    def loss(self) -> Tensor:
        """What is minimised."""

    def _asdict(self) -> dict[str, Tensor]: ...


class Stage(Protocol):
    """One stage as the loop sees it."""

    name: str
    objective: nn.Module
    optimizer: Optimizer
    averaged: AveragedModel | None

    def losses(self, frames: Indices) -> Losses:
        """Losses on the windows that end at `frames` (B,)."""

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step of the whole run."""


class VqVaeStage:
    """Stage 1: the residual VQ-VAE, from actions alone."""

    name = "stage 1"
    averaged: AveragedModel | None = None

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, network: VQBeT, data: WindowedDataset
    ) -> None:
        self._data = data
        vqvae = network.head.vqvae_model.requires_grad_(True)
        optimizer = _adam(
            config,
            [
                {
                    "params": list(vqvae.parameters()),
                    "lr": config.optimizer_vqvae_lr,
                    "weight_decay": config.optimizer_vqvae_weight_decay,
                }
            ],
        )
        objective = Stage1(vqvae, lambda tensor: _sum(accelerator, tensor))
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)

    def losses(self, frames: Indices) -> Losses:
        """See `Stage`."""
        result: Losses = self.objective(self._data.chunks(frames))
        return result

    def rate(self, step: int) -> float:  # noqa: ARG002
        """Constant, as in LeRobot's `VQBeTSchedulerConfig`."""
        return 1.0


class PolicyStage:
    """Stage 2: everything else, with the VQ-VAE frozen, buffers and all."""

    name = "stage 2"

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        network: VQBeT,
        data: WindowedDataset,
        scalings: Scalings,
    ) -> None:
        self._config, self._data = config, data
        network.head.vqvae_model.requires_grad_(False)
        if config.channels_last:
            network.vqbet.rgb_encoder.to(memory_format=torch.channels_last)
        objective: nn.Module = Stage2(network, scalings).to(accelerator.device)
        if config.compile:
            objective.compile()
        groups = parameter_groups(network, config)
        self.averaged: AveragedModel | None = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(network, multi_avg_fn=average)
        self.objective, self.optimizer = accelerator.prepare(objective, _adam(config, groups))

    def losses(self, frames: Indices) -> Losses:
        """See `Stage`."""
        result: Losses = self.objective(*self._data.batch(frames))
        return result

    def rate(self, step: int) -> float:
        """Warm-up, then a cosine that reaches its end with the run.

        LeRobot's `VQBeTSchedulerConfig` divides by the steps of both stages, so that its cosine
        ends early in its course.
        """
        done = step - self._config.n_vqvae_training_steps
        warmup = self._config.scheduler_warmup_steps
        if done < warmup:
            return done / warmup
        progress = (done - warmup) / max(1, self._config.stage2_steps - 1 - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class ParameterGroup(NamedTuple):
    """Parameters that decay, and those that do not."""

    decaying: list[nn.Parameter]
    others: list[nn.Parameter]


def parameter_groups(network: VQBeT, config: TrainConfig) -> list[dict[str, object]]:
    """Stage 2's groups: as in LeRobot, only the GPT's biases, norms and embeddings do not decay."""
    split = ParameterGroup([], [])
    for module, name, parameter in _owned_parameters(network):
        kept = isinstance(module, nn.LayerNorm | nn.Embedding) or name.endswith("bias")
        exempt = kept and name.startswith("vqbet.policy.")
        if parameter.requires_grad:
            (split.others if exempt else split.decaying).append(parameter)
    return [
        {"params": split.decaying, "weight_decay": config.optimizer_weight_decay},
        {"params": split.others, "weight_decay": 0.0},
    ]


def learned_code_books(
    config: TrainConfig, network: VQBeT, data: WindowedDataset, frames: Indices
) -> None:
    """Give the code books their first values before stage 1."""
    queries = config.n_obs_steps + config.n_action_pred_token - 1
    chunks = data.chunks(frames)
    initialize(network.head.vqvae_model, chunks, config.batch_size * queries)


def finish_code_books(network: VQBeT) -> None:
    """Mark the code books as learned and frozen, as LeRobot's checkpoints do."""
    vqvae = network.head.vqvae_model
    vqvae.discretized.fill_(True)
    vqvae.vq_layer.freeze_codebook.fill_(True)


def _owned_parameters(network: VQBeT) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, f"{prefix}.{name}", parameter


def _adam(config: TrainConfig, groups: list[dict[str, object]]) -> Adam:
    return Adam(
        groups,
        lr=config.optimizer_lr,
        betas=config.optimizer_betas,
        eps=config.optimizer_eps,
        fused=True,
    )


def _sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    total: Tensor = accelerator.reduce(tensor, reduction="sum")
    return total
