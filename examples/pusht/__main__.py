"""The end of the demo: a latency table beside eager PyTorch, and an animation of an episode.

`demo.sh` runs it: python -m examples.pusht outputs/demo
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqbet_edge import EdgePolicy
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.view.episodes import first_shown, open_episodes

HERE = Path(__file__).parent
CHECKPOINT, FRAMES = HERE / "checkpoint", HERE / "frames"
CHUNKS = 40
RATE = 10.0  # of PushT, in steps a second
ENLARGED = 4

Observation = Mapping[str, NDArray[Any]]


def latencies(bundles: Sequence[Path]) -> str:
    """A table of steps that predict a chunk, each policy by itself, one step after the other."""
    observations = _observations()
    with EdgePolicy(*load_backend(str(CHECKPOINT)), replan_every=1) as eager:
        rows = [_row("PyTorch, eager", eager.act, observations)]
    for bundle in bundles:
        with EdgePolicy.load(bundle, replan_every=1, prefetch="off") as policy:
            rows.append(_row(bundle.name, policy.act, observations))
    return "\n".join([f"{'predicting a chunk':<22} {'p50':>8} {'worst':>8}", *rows])


def _row(name: str, act: Callable[[Observation], object], seen: Sequence[Observation]) -> str:
    milliseconds = []
    for observation in seen:
        start = time.perf_counter()
        act(observation)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    counted = milliseconds[5:]  # behind the warm-up
    return f"{name:<22} {np.median(counted):5.2f} ms {max(counted):5.2f} ms"


def _observations() -> list[Observation]:
    data = LeRobotDataset.open(FRAMES)
    keys = ("observation.image", "observation.state")
    episode = data.episode(0, list(keys))
    return [{key: episode[key][step] for key in keys} for step in range(CHUNKS)]


def animate(episodes: Path, target: Path) -> str:
    """Write the first recorded episode that succeeded, or the first of all; its name."""
    shown = open_episodes(episodes)
    one = shown[first_shown(shown)]
    camera = one.recording.info.image_keys[0]
    frames = (one.episode.frame(camera, row) for row in range(len(one.episode)))
    first, *others = [
        Image.fromarray(frame).resize((frame.shape[1] * ENLARGED, frame.shape[0] * ENLARGED))
        for frame in frames
    ]
    first.save(target, save_all=True, append_images=others, duration=1000 / RATE, loop=0)
    return one.name


def main(output: Path) -> None:
    """Print the table, write `episode.webp`."""
    bundles = [output / f"pusht-{precision}.bundle" for precision in ("fp16", "int8")]
    sys.stdout.write(latencies(bundles) + "\n")
    target = output / "episode.webp"
    name = animate(output / "episodes", target)
    sys.stdout.write(f"\n{target}: {name}\n{output / 'demo.html'}: open it in a browser\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
