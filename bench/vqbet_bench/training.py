"""Training throughput in samples a second, beside LeRobot's own training step.

    python -m vqbet_bench.training tests/data/pusht

Both train the same network on the same demonstrations, image columns in a new data set, on the
same machine, one after the other and then once more in turn. A step is what a training loop does:
get a batch, forward, backward, clip, optimise. LeRobot gets its batches from its own data set and
a DataLoader in this process; it also reads and decodes images in stage 1, because its loop does.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset as LeRobotsDataset
from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy
from lerobot.policies.vqbet.processor_vqbet import make_vqbet_pre_post_processors

from vqbet_edge.cli import run
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.stages import PolicyStage, Stage, VqVaeStage
from vqbet_edge.training.windows import Shuffle, WindowedDataset, current_frames

Step = Callable[[], None]


@dataclass(frozen=True)
class Options:
    """Measure training throughput."""

    # A LeRobot data set; the first episodes are used.
    dataset: Annotated[str, tyro.conf.Positional]
    episodes: int = 4
    batch_size: int = 16
    # Steps that are timed, per turn.
    stage1_steps: int = 10
    stage2_steps: int = 3
    # How often both take turns.
    turns: int = 3
    threads: int = 2


@dataclass(frozen=True)
class Throughput:
    """Samples a second: the median over the turns, and all of them."""

    samples_per_second: float
    turns: list[float]


def measure(options: Options) -> dict[str, Any]:
    """Both stages, ours and LeRobot's, and their ratios."""
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        root = _with_image_columns(options, Path(folder) / "dataset")
        config = TrainConfig(dataset=str(root), output=Path(folder), batch_size=options.batch_size)
        result: dict[str, Any] = {"options": asdict(options), "torch": torch.__version__}
        for stage, steps in ((1, options.stage1_steps), (2, options.stage2_steps)):
            ours, theirs = _ours(config, stage), _lerobots(config, stage)
            found = _take_turns(options, steps, {"vqbet_edge": ours, "lerobot": theirs})
            ratio = found["vqbet_edge"].samples_per_second / found["lerobot"].samples_per_second
            result[f"stage {stage}"] = {k: asdict(v) for k, v in found.items()} | {"ratio": ratio}
    return result


def _with_image_columns(options: Options, root: Path) -> Path:
    source = LeRobotDataset.open(options.dataset)
    keys = [*source.image_keys, "observation.state", "action"]
    count = min(options.episodes, source.num_episodes)
    demonstrations = [source.episode(i, keys) for i in range(count)]
    write_dataset(root, demonstrations, fps=source.fps, task="benchmark")
    return root


def _take_turns(options: Options, steps: int, peers: dict[str, Step]) -> dict[str, Throughput]:
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for step in peers.values():
        step()  # warm up
    for _ in range(options.turns):
        for name, step in peers.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            rates[name].append(steps * options.batch_size / (time.perf_counter() - start))
    return {name: Throughput(sorted(r)[len(r) // 2], r) for name, r in rates.items()}


def _ours(config: TrainConfig, number: int) -> Step:
    dataset = LeRobotDataset.open(config.dataset)
    policy = config.policy(dataset)
    scalings = Scalings.of(dataset, policy)
    accelerator, network = Accelerator(cpu=True), VQBeT(policy)
    data = WindowedDataset(dataset, policy, scalings, accelerator.device)
    frames = current_frames(dataset, tuple(range(dataset.num_episodes)))
    batches = map(Shuffle(frames, config.batch_size, 0).batch, range(1_000_000))
    stage: Stage = (
        VqVaeStage(config, accelerator, network, data)
        if number == 1
        else PolicyStage(config, accelerator, network, data, scalings)
    )
    stage.objective.train()

    def step() -> None:
        loss = stage.losses(next(batches)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(stage.objective.parameters(), 10.0)
        stage.optimizer.step()
        stage.optimizer.zero_grad()

    return step


def _lerobots(config: TrainConfig, number: int) -> Step:
    dataset = LeRobotDataset.open(config.dataset)
    ours = config.policy(dataset)
    features = {
        key: PolicyFeature(FeatureType[f.type.value], f.shape)
        for key, f in {**ours.input_features, **ours.output_features}.items()
    }
    settings = VQBeTConfig(
        input_features={k: v for k, v in features.items() if k != "action"},
        output_features={"action": features["action"]},
        device="cpu",
    )
    policy = VQBeTPolicy(settings).train()
    if number == 2:
        policy.vqbet.action_head.vqvae_model.discretized.fill_(True)
        policy.vqbet.action_head.vqvae_model.vq_layer.freeze_codebook.fill_(True)
    stats = {
        key: {name: torch.from_numpy(value) for name, value in values.items()}
        for key, values in ((key, dataset.statistics(key)) for key in features)
    }
    preprocess, _ = make_vqbet_pre_post_processors(settings, stats)
    optimizer = settings.get_optimizer_preset().build(policy.get_optim_params())
    batches = _lerobots_batches(config, settings, dataset.fps)

    def step() -> None:
        loss, _ = policy.forward(preprocess(next(batches)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _lerobots_batches(config: TrainConfig, settings: Any, fps: float) -> Iterator[Any]:
    past = [i / fps for i in settings.observation_delta_indices]
    deltas = dict.fromkeys(settings.input_features, past)
    deltas["action"] = [i / fps for i in settings.action_delta_indices]
    theirs = LeRobotsDataset("benchmark/dataset", root=config.dataset, delta_timestamps=deltas)
    while True:
        yield from torch.utils.data.DataLoader(
            theirs, batch_size=config.batch_size, shuffle=True, drop_last=True
        )


def _main() -> None:
    options = tyro.cli(Options, prog="python -m vqbet_bench.training", use_underscores=True)
    sys.stdout.write(json.dumps(measure(options), indent=2) + "\n")


if __name__ == "__main__":
    run(_main)
