"""A contact sheet: some episodes, one per row, from their first frame to their last."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np

from vqbet_edge.training.evaluation.rollout import Episode
from vqbet_edge.training.files import writing

COLUMNS = 8
BORDER = 3
GREEN, RED = (40, 160, 60), (200, 40, 40)


def draw_sheet(episodes: Sequence[Episode], target: Path) -> None:
    """Write a PNG; solved episodes have a green border, the others a red one."""
    rows = []
    for episode in episodes:
        if episode.frames is not None:
            chosen = np.linspace(0, len(episode.frames) - 1, COLUMNS).round().astype(int)
            color = GREEN if episode.success else RED
            rows.append(np.concatenate([_framed(f, color) for f in episode.frames[chosen]], 1))
    write_picture(np.concatenate(rows, 0), target)


def write_picture(picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], target: Path) -> None:
    """Write (H, W, 3) as PNG."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(target, picture)


def _framed(
    frame: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], color: tuple[int, int, int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    height, width, _ = frame.shape
    framed = np.empty((height + 2 * BORDER, width + 2 * BORDER, 3), np.uint8)
    framed[:] = color
    framed[BORDER:-BORDER, BORDER:-BORDER] = frame
    return framed
