"""Windows of demonstrations, and in which order they are trained on.

All demonstrations lie behind each other; a window is a row of frame indices that never
leaves its episode: what lies outside repeats the first or last frame, as LeRobot pads.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import tee
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, VQBeTConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.table import Indices
from vqbet_edge.training.feeding import Feeder, Feeding
from vqbet_edge.training.normalization import Scalings


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
    """Batches of windows.

    Vectors are normalised once and live on the device; where frames come from is the feeder's.

    Args:
        dataset: the demonstrations.
        config: of the policy.
        scalings: of states and actions.
        device: where batches are wanted.
        feeding: where frames come from.
        check: see `Feeder`.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        config: VQBeTConfig,
        scalings: Scalings,
        device: torch.device,
        feeding: Feeding = Feeding(),  # noqa: B008 - immutable
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._device = config, device
        self._feeder = Feeder(dataset, config.image_keys, feeding, device, check)
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

    def chunks(self, frames: Indices) -> Tensor:
        """Phase 1's data: every query's action chunk of every window; no image is touched.

        Of the windows' current frames, int64 (B,): (B, Q, W, A), normalised. A relative chunk is
        the distance from the state of the step that it begins with, of a future query from the
        current step's, the newest that it can know.
        """
        queries, width = self._config.num_queries, self._config.action_chunk_size
        actions = self._actions[self._on_device(self._around(frames, queries + width - 1))]
        chunks = actions.unfold(1, width, 1).transpose(2, 3)  # (B, Q, A, W) -> (B, Q, W, A)
        if self._bases is None:
            return chunks
        known = self._around(frames, queries).clip(max=frames[:, None])
        return chunks - self._bases[self._on_device(known)][:, :, None]

    def batches(self, windows: Iterable[Indices]) -> Generator[Batch]:
        """Phase 2's data of the same, for the windows of one batch after the other.

        Of frames that are kept, the first one decodes all.
        """
        batches = self._batches(windows)
        if self._device.type != "cuda":
            yield from batches
            return
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        main = torch.cuda.current_stream(self._device)

        def following() -> Batch | None:
            with torch.cuda.stream(side):
                return next(batches, None)

        batch = following()
        while batch is not None:
            main.wait_stream(side)
            for tensor in batch:
                tensor.record_stream(main)
            # Copied to the GPU while it works on the present one.
            after = following()
            yield batch
            batch = after

    def _batches(self, windows: Iterable[Indices]) -> Generator[Batch]:
        own, ahead = tee(windows)
        count = self._config.n_obs_steps
        images = self._feeder.images(self._around(frames, count) for frames in ahead)
        with closing(images):
            for frames, seen in zip(own, images, strict=True):
                observed = self._on_device(self._around(frames, count))
                yield Batch(seen, self._states[observed], self.chunks(frames))

    def _around(self, frames: Indices, count: int) -> Indices:
        """(B,) -> int64 (B, count): frames from each window's oldest observation on."""
        offsets = np.arange(count) + 1 - self._config.n_obs_steps
        low, high = self._first[frames, None], self._last[frames, None]
        around: Indices = (frames[:, None] + offsets).clip(low, high)
        return around

    def _on_device(self, indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(self._device, non_blocking=True)


@dataclass(frozen=True)
class Shuffle:
    """Every frame once per epoch in a new order, without any state.

    What a step sees follows from the seed and the step's number alone, so a resumed run and a run
    on more processes see the same.
    """

    frames: Indices
    batch_size: int
    seed: int
    mixture: "Mixture | None" = None

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise DatasetError("no frames are left to train on; lower --validation-fraction")

    def batch(self, step: int) -> Indices:
        """int64 (batch_size,): the current frames of one step's windows."""
        if self.mixture is not None:
            return self.mixture.batch(self.batch_size, np.random.default_rng((self.seed, step)))
        wanted = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(wanted, len(self.frames))
        parts = [
            _permutation(len(self.frames), self.seed, epoch)[places[epochs == epoch]]
            for epoch in np.unique(epochs).tolist()
        ]
        found: Indices = self.frames[np.concatenate(parts)]
        return found


@dataclass(frozen=True)
class Mixture:
    """Frames of several data sets, drawn with replacement in a given proportion.

    Attributes:
        frames: int64 (F,) of each data set.
        weights: of each data set, above 0.
    """

    frames: tuple[Indices, ...]
    weights: tuple[float, ...]

    def batch(self, size: int, random: np.random.Generator) -> Indices:
        """int64 (size,)."""
        shares = np.array(self.weights) / sum(self.weights)
        chosen = random.choice(len(shares), size, p=shares)
        places = random.random(size)
        drawn = [self.frames[c][int(p * len(self.frames[c]))] for c, p in zip(chosen, places)]  # noqa: B905
        return np.array(drawn, np.int64)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng((seed, epoch)).permutation(size)
