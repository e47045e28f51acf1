"""Copy a PushT data set with the block's pose, its state as the `pusht_contact` environment's.

python tools/contact_pusht.py SOURCE TARGET
"""

import sys
from pathlib import Path

from vqbet_edge.data import LeRobotDataset
from vqbet_edge.data.writer import write_dataset
from vqbet_edge.model.config import ACTION_KEY, STATE_KEY
from vqbet_edge.training.evaluation.pusht import contact_state


def main(source: str, target: str) -> None:
    """Write `target`; images are stored without loss."""
    data = LeRobotDataset.open(source)
    keys = (*data.image_keys, STATE_KEY, ACTION_KEY)
    episodes = [data.episode(position, keys) for position in range(data.num_episodes)]
    states = [contact_state(episode[STATE_KEY]) for episode in episodes]
    demonstrations = [e | {STATE_KEY: s} for e, s in zip(episodes, states, strict=True)]
    write_dataset(Path(target), demonstrations, data.fps, "push the block onto its target")


if __name__ == "__main__":
    main(*sys.argv[1:])
