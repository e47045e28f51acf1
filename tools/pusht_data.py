"""What the tools for PushT data sets share."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import Demonstration, write_dataset

Demonstrations = Sequence[Demonstration]


def rewrite(
    source: str,
    target: Path,
    state: Sequence[str],
    change: Callable[[Demonstrations], Demonstrations],
) -> None:
    """Write `target` from the data set `source`; images are stored without loss.

    Args:
        source: a data set, see `LeRobotDataset.open`.
        target: a new folder.
        state: names of the numbers that the source's state has to have.
        change: what is written instead of the source's demonstrations.

    Raises:
        DatasetError: the state has another width.
    """
    data = LeRobotDataset.open(source)
    width = data.column(STATE_KEY).shape[1]
    if width != len(state):
        raise DatasetError(
            f"{source}: expected a state of {len(state)} numbers ({', '.join(state)}), got {width}"
        )
    keys = (*data.image_keys, STATE_KEY, ACTION_KEY)
    seen = [data.episode(position, keys) for position in range(data.num_episodes)]
    write_dataset(target, change(seen), data.fps, "push the block onto its target")
