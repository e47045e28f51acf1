"""The demo: `python -m examples.detour OUTPUT` trains, with a bundle behind it drives.

Run it in the repository's root; `demo.sh` does all of it, with the export in between.
"""

import functools
import shutil
import sys
from pathlib import Path

import tyro
from rich.console import Console

from examples.detour.baseline import RegressionBackend
from examples.detour.expert import collect
from examples.detour.picture import crashes, draw_paths
from vqbet_edge.cli import run
from vqbet_edge.errors import VerificationError
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.config import NormalizationMode, TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.description import without_graphs
from vqbet_edge.training.evaluation.actors import Actor, Siblings
from vqbet_edge.training.evaluation.detour import DetourEnv, Scene
from vqbet_edge.training.evaluation.rollout import run_episodes
from vqbet_edge.training.evaluation.summary import wilson
from vqbet_edge.training.files import writing
from vqbet_edge.training.trainer import train

SCENES = 200
VQVAE_STEPS, POLICY_STEPS = 600, 2400
BASELINE_STEPS = 300
EPISODES, SLOTS = 200, 8
SHOWN_SCENES = range(4)
FIRST_SEED = 500_000
NEEDED_SUCCESS = 0.9


def training(output: Path) -> TrainConfig:
    """The demo's configuration: small, and nothing but scale differs from a large one."""
    return TrainConfig(
        dataset=str(output / "demonstrations"),
        output=output / "training",
        steps=VQVAE_STEPS + POLICY_STEPS,
        n_vqvae_training_steps=VQVAE_STEPS,
        batch_size=32,
        n_obs_steps=3,
        action_chunk_size=5,
        vision_backbone="resnet10_small",
        # Batch norm and centred images: most pixels are white, and the encoder would take several
        # times as long to notice the goal.
        use_group_norm=False,
        crop_shape=None,
        vqvae_n_embed=8,
        vqvae_embedding_dim=64,
        gpt_n_layer=2,
        gpt_n_head=4,
        gpt_input_dim=128,
        gpt_hidden_dim=128,
        gpt_output_dim=128,
        gpt_block_size=32,
        # At the default 0.1 the slightly more probable side of the bar is nearly always taken.
        bet_softmax_temperature=0.3,
        # At the default weight the offsets drown the codes, which a short training cannot afford.
        offset_loss_weight=30.0,
        normalization_mapping={
            "VISUAL": NormalizationMode.MEAN_STD,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        },
        optimizer_lr=1e-3,
        scheduler_warmup_steps=50,
        validation_fraction=0.0,
    )


def prepare(output: Path) -> Path:
    """Collect, train, and return the policy's directory."""
    planned = training(output)
    with writing(output):
        for folder in (Path(planned.dataset), planned.output):
            shutil.rmtree(folder, ignore_errors=True)
        demonstrations = collect(SCENES, planned.seed)
        write_dataset(Path(planned.dataset), demonstrations, fps=10, task="reach the goal")
    return train(planned)


def drive(output: Path, policy: str) -> None:
    """Drive beside a plain regression, print the figures, draw `paths.png`.

    Raises:
        VerificationError: fewer than 90 % of the episodes succeed.
    """
    actor = Siblings(*load_backend(policy), SLOTS)
    policies: dict[str, Actor] = {"VQ-BeT": actor, "plain regression": _baseline(output)}
    seeds = range(FIRST_SEED, FIRST_SEED + EPISODES)
    arrived = {name: _drive_many(name, driver, seeds) for name, driver in policies.items()}
    in_one_scene = range(FIRST_SEED, FIRST_SEED + 4 * SLOTS)
    paths = {
        name: [
            run_episodes(
                functools.partial(DetourEnv, scene_seed=scene), driver, in_one_scene, slots=SLOTS
            )
            for scene in SHOWN_SCENES
        ]
        for name, driver in policies.items()
    }
    draw_paths([Scene.of(seed) for seed in SHOWN_SCENES], paths, output / "paths.png")
    sys.stdout.write(f"{output / 'paths.png'}\n")
    if arrived["VQ-BeT"] < NEEDED_SUCCESS:
        raise VerificationError(
            f"the policy succeeds in {arrived['VQ-BeT']:.0%} of the episodes, expected "
            f"{NEEDED_SUCCESS:.0%}; train it for more steps"
        )


def _drive_many(name: str, policy: Actor, seeds: range) -> float:
    """Print how many episodes, each in a scene of its own, arrive and crash; the share of those."""
    episodes = run_episodes(DetourEnv, policy, seeds, slots=SLOTS)
    arrived = wilson(sum(episode.success for episode in episodes), len(episodes))
    crashed = wilson(sum(crashes(episode) for episode in episodes), len(episodes))
    sys.stdout.write(
        f"{name:<18} arrives {arrived}, crashes {crashed} of {len(episodes)} episodes\n"
    )
    return arrived.mean


def _baseline(output: Path) -> Siblings:
    planned = training(output)
    Console(stderr=True).print("training the regression that averages ...")
    directory = planned.output / "checkpoints/last/pretrained_model"
    checkpoint, data = load_checkpoint(str(directory)), LeRobotDataset.open(planned.dataset)
    backend = RegressionBackend(checkpoint)
    backend.fit(planned, data, BASELINE_STEPS)
    return Siblings(without_graphs(checkpoint), backend, SLOTS)


def main(output: Path = Path("outputs/detour"), policy: str | None = None, /) -> None:
    """Train in the folder `output`, or drive with a policy that came of it."""
    if policy is None:
        sys.stdout.write(f"{prepare(output)}\n")
    else:
        drive(output, policy)


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
