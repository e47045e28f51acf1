"""A control loop around a bundle, fed with the observations of a recorded episode.

python examples/control_loop.py outputs/detour/demo-fp16.bundle outputs/detour/demonstrations
"""

import sys
import time

import numpy as np

from vqbet_edge import EdgePolicy
from vqbet_edge.training.dataset import LeRobotDataset


def main(bundle: str, dataset: str) -> None:
    """Act on every observation of the first episodes and say how long it took."""
    policy = EdgePolicy.load(bundle, seed=0)
    keys = list(policy.manifest.input_features)
    data = LeRobotDataset.open(dataset)
    predicting: list[float] = []
    queued: list[float] = []
    for position in range(min(4, data.num_episodes)):
        policy.reset()
        episode = data.episode(position, keys)
        for step in range(len(episode[keys[0]])):
            before, start = policy.last, time.perf_counter()
            policy.act({key: episode[key][step] for key in keys})
            seconds = time.perf_counter() - start
            (queued if policy.last is before else predicting).append(seconds)
    for name, samples in (("predicts a chunk", predicting), ("returns a queued action", queued)):
        p50, worst = (1e3 * float(figure) for figure in (np.median(samples), max(samples)))
        sys.stdout.write(f"a step that {name:<24} {p50:6.2f} ms, worst {worst:6.2f} ms\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
