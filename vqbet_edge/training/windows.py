"""Windows of demonstrations, and in which order they are trained on.

All demonstrations lie behind each other in memory; a window is a row of frame indices that never
leaves its episode: what lies outside repeats the first or last frame, as LeRobot pads.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, VQBeTConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.normalization import Scalings

Indices = npt.NDArray[np.int64]


def current_frames(dataset: LeRobotDataset, episodes: tuple[int, ...]) -> Indices:
    """int64 (F,): every frame of the given episodes."""
    spans = [np.arange(dataset.bounds[i], dataset.bounds[i + 1]) for i in episodes]
    return np.concatenate(spans) if spans else np.empty(0, np.int64)


class Batch(NamedTuple):
    """What one step of phase 2 sees."""

    images: Tensor  # uint8 (B, N, K, H, W, 3), shrunk if the policy resizes
    states: Tensor  # (B, N, S), normalised
    chunks: Tensor  # (B, Q, W, A), normalised: every query's action chunk


class WindowedDataset:
    """Batches of windows, straight from memory.

    Vectors are normalised once and live on the device, and so do the frames when they take less
    than half of its free memory.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        config: VQBeTConfig,
        scalings: Scalings,
        device: torch.device,
    ) -> None:
        self._dataset, self._config, self._device = dataset, config, device
        lengths = np.diff(dataset.bounds)
        # The first and the last frame of every frame's episode.
        self._first = np.repeat(dataset.bounds[:-1], lengths)
        self._last = np.repeat(dataset.bounds[1:] - 1, lengths)
        self._states = scalings.normalize(STATE_KEY, dataset.column(STATE_KEY)).to(device)
        self._actions = scalings.normalize(ACTION_KEY, dataset.column(ACTION_KEY)).to(device)
        self._bases: Tensor | None = None
        if config.use_relative_actions:
            # What relative actions are distances from, in the actions' scale.
            scale = np.where(config.relative_actions, scalings.forward[ACTION_KEY].multiply, 0)
            bases = dataset.column(STATE_KEY)[:, : config.action_dim] * scale
            self._bases = torch.from_numpy(bases.astype(np.float32)).to(device)
        self._frames: list[Tensor] | None = None

    def chunks(self, frames: Indices) -> Tensor:
        """Phase 1's data: every query's action chunk of every window; no image is touched.

        Of the windows' current frames, int64 (B,): (B, Q, W, A), normalised. A relative chunk is
        the distance from the state of the step that it begins with, of a future query from the
        current step's, the newest that it can know.
        """
        queries, width = self._config.num_queries, self._config.action_chunk_size
        actions = self._actions[self._around(frames, queries + width - 1).to(self._device)]
        chunks = actions.unfold(1, width, 1).transpose(2, 3)  # (B, Q, A, W) -> (B, Q, W, A)
        if self._bases is None:
            return chunks
        known = self._around(frames, queries).clamp(max=torch.from_numpy(frames)[:, None])
        return chunks - self._bases[known.to(self._device)][:, :, None]

    def batch(self, frames: Indices) -> Batch:
        """Phase 2's data of the same; the first call decodes the cameras' frames."""
        if self._frames is None:
            self._frames = self._load_frames()
        observed = self._around(frames, self._config.n_obs_steps)
        images = [
            camera[observed.to(camera.device)].to(self._device, non_blocking=True)
            for camera in self._frames
        ]
        return Batch(
            images=torch.stack(images, dim=2),
            states=self._states[observed.to(self._device)],
            chunks=self.chunks(frames),
        )

    def _around(self, frames: Indices, count: int) -> Tensor:
        """(B,) -> int64 (B, count): frames from each window's oldest observation on."""
        offsets = np.arange(count) + 1 - self._config.n_obs_steps
        low, high = self._first[frames, None], self._last[frames, None]
        return torch.from_numpy((frames[:, None] + offsets).clip(low, high))

    def _load_frames(self) -> list[Tensor]:
        cameras = [torch.from_numpy(self._dataset.frames(k)) for k in self._config.image_keys]
        if self._device.type != "cuda":
            return cameras
        free, _ = torch.cuda.mem_get_info(self._device)
        resident = sum(camera.nbytes for camera in cameras) < free / 2
        return [camera.to(self._device) for camera in cameras] if resident else cameras


@dataclass(frozen=True)
class Shuffle:
    """Every frame once per epoch in a new order, without any state.

    What a step sees follows from the seed and the step's number alone, so a resumed run and a run
    on more processes see the same.
    """

    frames: Indices
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise DatasetError("no frames are left to train on; lower --validation-fraction")

    def batch(self, step: int) -> Indices:
        """int64 (batch_size,): the current frames of one step's windows."""
        wanted = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(wanted, len(self.frames))
        parts = [
            _permutation(len(self.frames), self.seed, epoch)[places[epochs == epoch]]
            for epoch in np.unique(epochs).tolist()
        ]
        found: Indices = self.frames[np.concatenate(parts)]
        return found


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng((seed, epoch)).permutation(size)
