"""Observations to verify an export on: random ones, and real ones from a data set."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.dataset import LeRobotDataset

# Long enough for the window to fill and move on; episodes are spread over the data set.
PIECE_STEPS = 16


class Piece(NamedTuple):
    """Consecutive observations of one episode, from an empty history.

    Letters: M steps, K cameras, H and W image height and width, S state width.
    """

    frames: NDArray[np.uint8]  # (M, K, H, W, 3), whole frames
    states: NDArray[np.float32]  # (M, S), in the robot's units


def random_pieces(checkpoint: Checkpoint, steps: int) -> Iterator[Piece]:
    """Frames of noise, states spread over the range that normalisation maps to [-1, 1]."""
    config, random = checkpoint.config, np.random.default_rng(0)
    _, height, width = config.image_shape
    scaling = checkpoint.inputs[STATE_KEY]
    for start in range(0, steps, PIECE_STEPS):
        length = min(PIECE_STEPS, steps - start)
        shape = (length, len(config.image_keys), height, width, 3)
        normalized = random.uniform(-1, 1, (length, config.state_dim))
        states = (normalized - scaling.add) / scaling.multiply + scaling.subtract
        yield Piece(random.integers(0, 256, shape, np.uint8), states.astype(np.float32))


def dataset_pieces(checkpoint: Checkpoint, source: str, steps: int) -> Iterator[Piece]:
    """Pieces of real episodes, at least `steps` observations in all, spread over the data set.

    Args:
        checkpoint: the policy, whose features the data set must have.
        source: a folder in LeRobot's format or the id of a data set on the Hub.
        steps: how many observations.

    Raises:
        DatasetError: a feature is missing or has another shape.
    """
    dataset = LeRobotDataset.open(source)
    count = -(-steps // PIECE_STEPS)
    positions = np.linspace(0, dataset.num_episodes - 1, count).round().astype(int).tolist()
    for position in positions:
        yield _piece(checkpoint, dataset, position)


def _piece(checkpoint: Checkpoint, dataset: LeRobotDataset, position: int) -> Piece:
    """The middle of one episode."""
    config = checkpoint.config
    names = {key: checkpoint.renamed.get(key, key) for key in (*config.image_keys, STATE_KEY)}
    missing = [name for name in names.values() if name not in dataset.features]
    if missing:
        raise DatasetError(
            f"the data set lacks {missing}, which the policy observes; it has "
            f"{sorted(dataset.features)}"
        )
    arrays = dataset.episode(position, list(names.values()))
    start = max(0, (len(arrays[names[STATE_KEY]]) - PIECE_STEPS) // 2)
    rows = slice(start, start + PIECE_STEPS)
    frames = np.stack([arrays[names[key]][rows] for key in config.image_keys], axis=1)
    states = arrays[names[STATE_KEY]][rows].astype(np.float32)
    _check_shapes(checkpoint, frames, states)
    return Piece(frames, states)


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
