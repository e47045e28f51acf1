"""Small data sets of made-up demonstrations."""

from pathlib import Path

import numpy as np

from vqbet_edge.training.dataset.writer import write_dataset


def demonstrations(
    root: Path,
    *,
    state: int = 2,
    camera: str = "front",
    high: float = 1,
    size: tuple[int, int] = (64, 64),
) -> Path:
    """Three episodes of noise: 12 frames, as many states as asked for, two actions."""
    random = np.random.default_rng(0)
    episodes = [
        {
            f"observation.images.{camera}": random.integers(0, 256, (12, *size, 3), np.uint8),
            "observation.state": random.uniform(-1, 1, (12, state)).astype(np.float32),
            "action": random.uniform(-1, high, (12, 2)).astype(np.float32),
        }
        for _ in range(3)
    ]
    write_dataset(root, episodes, fps=10, task="move")
    return root
