"""Copy a PushT data set, changed; images are stored without loss.

python tools/pusht_data.py mirror SOURCE TARGET     # and its mirror image behind it
python tools/pusht_data.py contact SOURCE TARGET    # the state as that of `pusht_contact`
python tools/pusht_data.py pusher SOURCE TARGET     # the state without the block
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from vqbet_edge.cli import run
from vqbet_edge.errors import DatasetError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.dataset import SOURCE
from vqbet_edge.training.dataset.writer import Demonstration, write_dataset
from vqbet_edge.training.evaluation.pusht import contact_state, mirror_frames, mirror_points

Demonstrations = Sequence[Demonstration]


def _mirror(seen: Demonstrations) -> Demonstrations:
    """All of them as they are, then all of them mirrored."""
    points = {STATE_KEY, ACTION_KEY}
    mirrored = [
        {k: mirror_points(v) if k in points else mirror_frames(v) for k, v in each.items()}
        for each in seen
    ]
    return [
        {**each, SOURCE: np.full((len(each[ACTION_KEY]), 1), number)}
        for side in (seen, mirrored)
        for number, each in enumerate(side)
    ]


def _contact(seen: Demonstrations) -> Demonstrations:
    return [{**each, STATE_KEY: contact_state(each[STATE_KEY])} for each in seen]


def _pusher(seen: Demonstrations) -> Demonstrations:
    return [{**each, STATE_KEY: each[STATE_KEY][:, :2]} for each in seen]


# Names of the numbers that the source's state has to have, and what is written instead.
_POSE = ("x", "y", "block's x", "block's y", "angle")
_CHANGES: dict[str, tuple[tuple[str, ...], Callable[[Demonstrations], Demonstrations]]] = {
    "mirror": (("x", "y"), _mirror),
    "contact": (_POSE, _contact),
    "pusher": (_POSE, _pusher),
}


def main(change: Literal["mirror", "contact", "pusher"], source: str, target: Path, /) -> None:
    """Write `target` from the data set `source`."""
    state, changed = _CHANGES[change]
    data = LeRobotDataset.open(source)
    width = data.column(STATE_KEY).shape[1]
    if width != len(state):
        raise DatasetError(
            f"{source}: expected a state of {len(state)} numbers ({', '.join(state)}), got {width}"
        )
    keys = (*data.image_keys, STATE_KEY, ACTION_KEY)
    seen = [data.episode(position, keys) for position in range(data.num_episodes)]
    write_dataset(target, changed(seen), data.fps, "push the block onto its target")


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
