"""What the demo compares with: the same network with a plain regression head.

It learns the mean of the demonstrated chunks, and the mean of left and right is the bar: it never
goes both ways in one scene, and crashes where its own first steps have not settled the side.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.evaluation.actors import ActorOptions, Floats, TorchActor
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.windows import Shuffle, WindowedDataset, current_frames

LEARNING_RATE = 5e-4


class RegressionActor(TorchActor):
    """The trained trunk, tuned on with a linear head instead of codes."""

    def __init__(self, checkpoint: Checkpoint, slots: int) -> None:
        super().__init__(checkpoint, slots, ActorOptions())
        config = checkpoint.config
        flat = config.action_chunk_size * config.action_dim
        self._head = nn.Linear(config.gpt_output_dim, flat).to(self._device)

    def fit(self, config: TrainConfig, dataset: LeRobotDataset, steps: int) -> None:
        """Minimise the squared error of the current step's chunk."""
        policy = self._config
        scalings = Scalings.of(dataset, policy)
        data = WindowedDataset(dataset, policy, scalings, self._device)
        everything = current_frames(dataset, tuple(range(dataset.num_episodes)))
        shuffle = Shuffle(everything, config.batch_size, config.seed)
        network = copy.deepcopy(self._network).requires_grad_(True)
        torch.manual_seed(config.seed)
        trained = [*network.vqbet.parameters(), *self._head.parameters()]
        optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE, fused=True)
        network.train()
        first = policy.n_obs_steps - 1
        for step in range(steps):
            batch = data.batch(shuffle.batch(step))
            features = network(self._pixels(batch.images), batch.states)[:, first]
            chunks = batch.chunks[:, first].flatten(1)
            loss = F.mse_loss(self._head(features), chunks)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self._network = network.eval()

    @torch.no_grad()
    def chunks(self, features: Tensor, slots: Sequence[int]) -> Floats:  # noqa: ARG002
        """The mean chunk, whatever the slot."""
        chunks: Floats = (
            self._head(features).unflatten(-1, (self._config.action_chunk_size, -1)).cpu().numpy()
        )
        return chunks
