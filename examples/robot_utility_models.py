"""A bundle of Robot Utility Models or Contact-Anchored Policies, one action for every frame.

python examples/robot_utility_models.py door_opening.bundle                     # random frames
python examples/robot_utility_models.py door_opening.bundle robot_images/FOLDER # what was saved

Their controller saves what it saw and did: 0.jpg, 1.jpg, ... and action_list.npy. Where the bundle
takes no goal, its actions are compared with those. docs/robot-utility-models.md has the rest.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import EdgePolicy, Guards

STEPS = 20
# Metres, radians, gripper. Their training leaves out steps of more than 0.05 m.
LOWEST, HIGHEST = (-0.05,) * 3 + (-0.5,) * 3 + (0,), (0.05,) * 3 + (0.5,) * 3 + (1,)
# Contact-Anchored Policies: metres to the left, ahead and down, in the camera's frame.
GOAL = np.array([0, 0.4, 0.1], np.float32)


def synthetic() -> Iterable[NDArray[np.uint8]]:
    """A camera that sees noise: RGB, uint8 (256, 256, 3)."""
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        yield random.integers(0, 256, (256, 256, 3), np.uint8)


def saved(folder: Path) -> Iterable[NDArray[np.uint8]]:
    """The pictures that their controller saved, in order."""
    from PIL import Image  # noqa: PLC0415 - pip install pillow, for this way only

    for number in range(len(list(folder.glob("*.jpg")))):
        yield np.asarray(Image.open(folder / f"{number}.jpg").convert("RGB"))


def main(bundle: str, folder: str | None = None) -> None:
    """Act on every frame, print the actions, and how far they are from the saved ones."""
    frames = synthetic() if folder is None else saved(Path(folder))
    actions = []
    limits = Guards(action_limits=(LOWEST, HIGHEST))
    with EdgePolicy.load(bundle, guards=limits) as policy:
        takes_goal = "observation.goal" in policy.manifest.input_features
        goal = {"observation.goal": GOAL} if takes_goal else {}
        policy.reset()
        for frame in frames:
            start = time.perf_counter()
            action = policy.act({"observation.image": frame, **goal})
            took = 1e3 * (time.perf_counter() - start)
            numbers = " ".join(f"{number:7.3f}" for number in action)
            sys.stdout.write(f"{numbers}   {took:6.1f} ms\n")
            actions.append(action)
    if folder is None or takes_goal:
        return
    wanted = np.load(Path(folder) / "action_list.npy").reshape(-1, len(actions[0]))[: len(actions)]
    off = np.abs(np.stack(actions[: len(wanted)]) - np.clip(wanted, LOWEST, HIGHEST)).max(axis=0)
    sys.stdout.write(f"largest differences from what was saved: {off.tolist()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
