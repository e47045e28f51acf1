"""Copy a PushT data set of pictures and the pusher's position, and its mirror image behind it.

python tools/mirror_pusht.py SOURCE TARGET
"""

from pathlib import Path

import tyro
from pusht_data import Demonstrations, rewrite

from vqbet_edge.cli import run
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY
from vqbet_edge.training.evaluation.pusht import mirror_frames, mirror_points


def with_mirror_image(seen: Demonstrations) -> Demonstrations:
    """All of them as they are, then all of them mirrored."""
    mirrored = [
        {
            key: mirror_points(values) if key in {STATE_KEY, ACTION_KEY} else mirror_frames(values)
            for key, values in each.items()
        }
        for each in seen
    ]
    return [*seen, *mirrored]


def main(source: str, target: Path, /) -> None:
    """Write `target` from the data set `source`; images are stored without loss."""
    rewrite(source, target, ("x", "y"), with_mirror_image)


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
