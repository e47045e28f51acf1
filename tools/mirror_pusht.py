"""Copy a PushT data set of pictures and the pusher's position, and its mirror image behind it.

python tools/mirror_pusht.py SOURCE TARGET
"""

from pathlib import Path

import tyro

from vqbet_edge.cli import run
from vqbet_edge.errors import DatasetError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import Demonstration, write_dataset
from vqbet_edge.training.evaluation.pusht import mirror_frames, mirror_points


def mirror(source: str, target: Path, /) -> None:
    """Write `target` from the data set `source`; images are stored without loss."""
    data = LeRobotDataset.open(source)
    width = data.column(STATE_KEY).shape[1]
    if width != 2:
        raise DatasetError(f"{source}: expected a state of 2 numbers (x, y), got {width}")
    keys = (*data.image_keys, STATE_KEY, ACTION_KEY)
    seen = [data.episode(position, keys) for position in range(data.num_episodes)]
    mirrored: list[Demonstration] = [
        {
            key: mirror_frames(values) if key in data.image_keys else mirror_points(values)
            for key, values in episode.items()
        }
        for episode in seen
    ]
    write_dataset(target, [*seen, *mirrored], data.fps, "push the block onto its target")


if __name__ == "__main__":
    run(lambda: tyro.cli(mirror))
