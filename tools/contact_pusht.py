"""Copy a PushT data set with the block's pose, its state as the `pusht_contact` environment's.

python tools/contact_pusht.py SOURCE TARGET
"""

from pathlib import Path

import tyro

from vqbet_edge.cli import run
from vqbet_edge.errors import DatasetError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.evaluation.pusht import contact_state


def rewrite(source: str, target: Path, /) -> None:
    """Write `target` from the data set `source`; images are stored without loss."""
    data = LeRobotDataset.open(source)
    width = data.column(STATE_KEY).shape[1]
    if width != 5:
        raise DatasetError(f"{source}: expected a state of 5 numbers (pusht_pose), got {width}")
    keys = (*data.image_keys, STATE_KEY, ACTION_KEY)
    episodes = [data.episode(position, keys) for position in range(data.num_episodes)]
    demonstrations = [e | {STATE_KEY: contact_state(e[STATE_KEY])} for e in episodes]
    write_dataset(target, demonstrations, data.fps, "push the block onto its target")


if __name__ == "__main__":
    run(lambda: tyro.cli(rewrite))
