"""What the parts of the training loop share."""

from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from vqbet_edge.training.checkpoints import Checkpoints, Progress
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.metrics import Reporter
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.windows import Indices, Shuffle, WindowedDataset

# Windows that k-means, revival and the reports on codes look at.
SAMPLE_WINDOWS = 4096


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
    stopping: KeyboardInterrupt | None = None

    def share(self, frames: Indices) -> Indices:
        """This process's part of a batch."""
        own: Indices = np.array_split(frames, self.accelerator.num_processes)[
            self.accelerator.process_index
        ]
        return own

    def sample(self) -> Indices:
        """The windows that the code books are looked at with, the same all along the run."""
        frames = self.shuffle.frames
        order = np.random.default_rng(self.config.seed).permutation(len(frames))
        return frames[order[:SAMPLE_WINDOWS]]
