"""Observations to verify an export on: random ones, and real ones from a data set."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.dataset import LeRobotDataset

# Long enough for the window to fill and move on; episodes are spread over the data set.
SEGMENT_STEPS = 16


class Segment(NamedTuple):
    """Consecutive observations, as one batch of robots would see them, from an empty history.

    Letters: M steps, B batch, K cameras, H and W image height and width, S state width.
    """

    frames: NDArray[np.uint8]  # (M, B, K, H, W, 3), whole frames
    states: NDArray[np.float32]  # (M, B, S), in the robot's units


def random_segments(checkpoint: Checkpoint, steps: int, batch: int) -> list[Segment]:
    """Frames of noise and states spread over the range that normalisation maps to [-1, 1]."""
    config, random = checkpoint.config, np.random.default_rng(0)
    _, height, width = config.image_shape
    frames_shape = (steps, batch, len(config.image_keys), height, width, 3)
    scaling = checkpoint.inputs[STATE_KEY]
    normalized = random.uniform(-1, 1, (steps, batch, config.state_dim))
    states = (normalized - scaling.add) / scaling.multiply + scaling.subtract
    frames = random.integers(0, 256, frames_shape, np.uint8)
    return [Segment(frames, states.astype(np.float32))]


def dataset_segments(checkpoint: Checkpoint, source: str, steps: int, batch: int) -> list[Segment]:
    """Pieces of real episodes, `steps` observations in all, spread over the data set.

    Args:
        checkpoint: the policy, whose features the data set must have.
        source: a folder in LeRobot's format or the id of a data set on the Hub.
        steps: how many observations.
        batch: how many pieces run side by side.

    Raises:
        DatasetError: a feature is missing or has another shape.
    """
    dataset = LeRobotDataset.open(source)
    count = -(-steps // SEGMENT_STEPS)
    positions = np.linspace(0, dataset.num_episodes - 1, count * batch).round().astype(int)
    pieces = [_piece(checkpoint, dataset, int(position)) for position in positions]
    shortest = min(len(piece.states) for piece in pieces)
    return [
        Segment(
            np.concatenate([p.frames[:shortest] for p in pieces[i : i + batch]], axis=1),
            np.concatenate([p.states[:shortest] for p in pieces[i : i + batch]], axis=1),
        )
        for i in range(0, len(pieces), batch)
    ]


def _piece(checkpoint: Checkpoint, dataset: LeRobotDataset, position: int) -> Segment:
    """The middle of one episode, with a batch axis of 1."""
    config = checkpoint.config
    names = {key: checkpoint.renamed.get(key, key) for key in (*config.image_keys, STATE_KEY)}
    missing = [name for name in names.values() if name not in dataset.features]
    if missing:
        raise DatasetError(
            f"the data set lacks {missing}, which the policy observes; it has "
            f"{sorted(dataset.features)}"
        )
    arrays = dataset.episode(position, list(names.values()))
    start = max(0, (len(arrays[names[STATE_KEY]]) - SEGMENT_STEPS) // 2)
    rows = slice(start, start + SEGMENT_STEPS)
    frames = np.stack([arrays[names[key]][rows] for key in config.image_keys], axis=1)
    states = arrays[names[STATE_KEY]][rows].astype(np.float32)
    _check_shapes(checkpoint, frames, states)
    return Segment(frames[:, None], states[:, None])


def _check_shapes(
    checkpoint: Checkpoint, frames: NDArray[np.uint8], states: NDArray[np.float32]
) -> None:
    channels, height, width = checkpoint.config.image_shape
    expected = (height, width, channels), (checkpoint.config.state_dim,)
    got = frames.shape[2:], states.shape[1:]
    if expected != got:
        raise DatasetError(
            f"the policy observes images {expected[0]} and states {expected[1]}, the data set has "
            f"{got[0]} and {got[1]}; verify on the data set that the policy was trained on"
        )
