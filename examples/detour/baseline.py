"""What the demo compares with: the same network with a plain regression head.

It learns the mean of the demonstrated chunks, and the mean of left and right is the bar: it never
goes both ways in one scene, and crashes where its own first steps have not settled the side.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vqbet_edge.runtime.backends.base import Floats
from vqbet_edge.training.backend import TorchBackend
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.windows import Shuffle, WindowedDataset, current_frames

LEARNING_RATE = 5e-4


class RegressionBackend(TorchBackend):
    """The trained trunk, tuned on with a linear head instead of codes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        flat = self.config.action_chunk_size * self.config.action_dim
        self._head = nn.Linear(self.config.gpt_output_dim, flat).to(self.device)

    def fit(self, config: TrainConfig, dataset: LeRobotDataset, steps: int) -> None:
        """Minimise the squared error of the current step's chunk."""
        policy = self.config
        scalings = Scalings.of(dataset, policy)
        data = WindowedDataset(dataset, policy, scalings, self.device)
        everything = current_frames(dataset, tuple(range(dataset.num_episodes)))
        shuffle = Shuffle(everything, config.batch_size, config.seed)
        network = copy.deepcopy(self.network).requires_grad_(True)
        torch.manual_seed(config.seed)
        trained = [*network.vqbet.parameters(), *self._head.parameters()]
        optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE, fused=True)
        network.train()
        first = policy.n_obs_steps - 1
        for batch in data.batches(shuffle.batch(step) for step in range(steps)):
            features = network(self.pixels(batch.images), batch.states)[:, first]
            chunks = batch.chunks[:, first].flatten(1)
            loss = F.mse_loss(self._head(features), chunks)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.network = network.eval()

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits that mean nothing, and the mean chunk as every primary code's offset."""
        logits, offsets = super().heads(features)
        chunks = self._head(features).view(len(features), 1, *offsets.shape[-2:])
        offsets = torch.stack([chunks.expand_as(offsets[:, 0]), torch.zeros_like(offsets[:, 1])], 1)
        return logits, offsets

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """Nothing: the offset is the chunk."""
        return np.zeros_like(super().decode(codes))
