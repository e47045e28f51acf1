"""How long LeRobot's control loop waits for an action: a checkpoint against its bundle.

    python control_loop_time.py CHECKPOINT BUNDLE

One process with LeRobot 0.6 and the plugin. What is timed is a tick of `lerobot-rollout` between
observation and action, by LeRobot's own engine: tensors, preprocessor, policy, postprocessor.
Policies take turns, each paced like a robot; frames are noise, which takes as long as a camera's.
Prints a table for a README; do nothing else on the machine meanwhile.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.rollout.inference.sync import SyncInferenceEngine
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot.utils.robot_utils import precise_sleep
from numpy.typing import NDArray

_WARM_UP = 20


class Driver:
    """A policy in LeRobot's engine."""

    def __init__(self, path: str) -> None:
        config = PreTrainedConfig.from_pretrained(path)
        config.pretrained_path = path
        policy = get_policy_class(config.type).from_pretrained(path, config=config)
        policy.eval()
        before, after = make_pre_post_processors(config, pretrained_path=path)
        self.config = config
        width = config.output_features["action"].shape[0]
        names = [f"joint_{number}.pos" for number in range(width)]
        self._engine = SyncInferenceEngine(
            policy, before, after, {"action": {"names": names}}, names, "", "cpu", "simulated"
        )

    def run(
        self, ticks: int, rate: float, chunk: int, random: np.random.Generator
    ) -> NDArray[np.float64]:
        """Milliseconds (T,) of a new episode's ticks, after some that do not count.

        The first of every `chunk` predicts.
        """
        self._engine.reset()
        times = []
        for observation in self._observations(_WARM_UP * chunk + ticks, random):
            start = time.perf_counter()
            self._engine.get_action(observation)
            spent = time.perf_counter() - start
            times.append(spent * 1e3)
            precise_sleep(max(0.0, 1 / rate - spent))
        return np.array(times[_WARM_UP * chunk :])

    def _observations(self, count: int, random: np.random.Generator) -> Iterator[dict[str, Any]]:
        """As a robot's: uint8 (H, W, 3) and float32 (S,)."""
        features = {key: tuple(f.shape) for key, f in self.config.input_features.items()}
        for _ in range(count):
            yield {
                key: random.integers(0, 256, (*shape[1:], 3), np.uint8)
                if len(shape) == 3
                else random.uniform(0, 1, shape).astype(np.float32)
                for key, shape in features.items()
            }


def _table(found: dict[str, list[NDArray[np.float64]]], rate: float, chunk: int) -> str:
    rows = [
        "| | chunk predicted, p50 | p99 | worst | queued action, p50 | ticks over the period |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rounds in found.items():
        times = np.concatenate(rounds)
        first = np.concatenate([each[::chunk] for each in rounds])
        rest = np.concatenate([np.delete(each, np.s_[::chunk]) for each in rounds])
        queued = f"{np.median(rest):.2f} ms" if len(rest) else "none"
        rows.append(
            f"| {name} | {np.median(first):.2f} ms | {np.quantile(first, 0.99):.2f} ms "
            f"| {first.max():.2f} ms | {queued} | {np.mean(times > 1e3 / rate):.1%} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("policies", nargs="+", help="a checkpoint of LeRobot's, then bundles of it")
    parser.add_argument("--rate", type=float, default=30.0, help="ticks a second")
    parser.add_argument("--rounds", type=int, default=5, help="turns that every policy takes")
    parser.add_argument("--ticks", type=int, default=300, help="of a turn")
    arguments = parser.parse_args()
    register_third_party_plugins()
    drivers = {path: Driver(path) for path in arguments.policies}
    chunk = next(iter(drivers.values())).config.action_chunk_size
    found: dict[str, list[NDArray[np.float64]]] = {path: [] for path in drivers}
    random = np.random.default_rng(0)
    for _ in range(arguments.rounds):
        for path, driver in drivers.items():
            found[path].append(driver.run(arguments.ticks, arguments.rate, chunk, random))
    sys.stdout.write(_table(found, arguments.rate, chunk) + "\n")


if __name__ == "__main__":
    main()
