"""Copy a PushT data set with the block's pose, its state as the `pusht_contact` environment's.

python tools/contact_pusht.py SOURCE TARGET
"""

from pathlib import Path

import tyro
from pusht_data import Demonstrations, rewrite

from vqbet_edge.cli import run
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.evaluation.pusht import contact_state


def with_contact(seen: Demonstrations) -> Demonstrations:
    """The same ones in the other state."""
    return [{**each, STATE_KEY: contact_state(each[STATE_KEY])} for each in seen]


def main(source: str, target: Path, /) -> None:
    """Write `target` from the data set `source`; images are stored without loss."""
    rewrite(source, target, ("x", "y", "block's x", "block's y", "angle"), with_contact)


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
