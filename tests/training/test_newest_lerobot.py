"""LeRobot 0.6.1's own commands: what it trains acts here, what we train it evaluates.

It needs Python 3.12: `make test-all PYTHON=python3.12`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from vqbet_export.exporter import ExportConfig, export

from vqbet_edge import EdgePolicy, Guards
from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.training import TrainConfig, load_checkpoint, train
from vqbet_edge.training.config import NormalizationMode
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.windows import WindowedDataset

STATE, CAMERA = "observation.state", "observation.image"

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(
        not oracle.newest(), reason="LeRobot 0.6 needs Python 3.12; here it is 0.4.4"
    ),
    pytest.mark.xdist_group("newest_lerobot"),
]


def lerobot_command(module: str, *arguments: str, cwd: Path) -> str:
    """Run one of LeRobot's commands; its output."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "SDL_VIDEODRIVER": "dummy", "OMP_NUM_THREADS": "1",
        "HF_HOME": str(cwd / "hf"), "WANDB_MODE": "disabled",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", f"lerobot.scripts.{module}", *arguments],
        capture_output=True, text=True, env=environment, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(pusht: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lerobot-train` leaves after a few steps."""
    folder = tmp_path_factory.mktemp("lerobot")
    lerobot_command(
        "lerobot_train",
        "--dataset.repo_id=local/pusht", f"--dataset.root={pusht}",
        "--policy.type=vqbet", "--policy.push_to_hub=false", "--policy.device=cpu",
        "--policy.n_vqvae_training_steps=20", "--steps=30", "--batch_size=8",
        # Its default. After so few steps codes are nearly tied with some seeds, and INT8 is refused.
        "--wandb.enable=false", "--num_workers=0", "--save_freq=30", "--seed=1000",
        "--policy.gpt_n_layer=2", "--policy.pretrained_backbone_weights=null",
        f"--output_dir={folder / 'run'}",
        cwd=folder,
    )  # fmt: skip
    return folder / "run" / "checkpoints" / "last" / "pretrained_model"


class Reference:
    """LeRobot's policy and processors as `lerobot-eval` loads them."""

    def __init__(self, directory: Path) -> None:
        modeling = oracle.lerobot("policies.vqbet.modeling_vqbet")
        self.policy = modeling.VQBeTPolicy.from_pretrained(directory).eval()
        factory = oracle.lerobot("policies.factory")
        self.before, self.after = factory.make_pre_post_processors(
            self.policy.config, pretrained_path=str(directory)
        )
        self.codes = oracle.InjectedCodes(self.policy)
        self.policy.reset()

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        image = torch.from_numpy(observation[CAMERA]).permute(2, 0, 1).float() / 255
        batch = self.before({CAMERA: image, STATE: torch.from_numpy(observation[STATE])})
        with self.codes.patch(), torch.no_grad():
            action: np.ndarray = self.after(self.policy.select_action(batch))[0].numpy()
        return action


def agree(directory: Path, bundle: Path, pusht: Path, limit: float) -> None:
    """Both act on one episode with the same codes."""
    reference = Reference(directory)
    # A policy after a few steps reaches out of its data, where the robot's limits would end it.
    robot = EdgePolicy.load(bundle, guards=Guards(action_limits=None))
    sampler = robot._planner.sampler
    choose = sampler.choose
    sampler.choose = lambda outputs, *_: choose(  # type: ignore[method-assign]
        outputs, np.array(reference.codes.codes)
    )
    dataset = LeRobotDataset.open(pusht)
    span = np.ptp(dataset.column("action"), axis=0)
    episode, random = dataset.episode(1), np.random.default_rng(0)
    for step in range(20):
        reference.codes.codes = tuple(random.integers(16, size=2).tolist())
        observation = {key: episode[key][step] for key in (CAMERA, STATE)}
        expected, got = reference.act(observation), robot.act(observation)
        assert (np.abs(got - expected) / span).max() <= limit, step


# Of INT8 four times the largest error of three policies (seeds 1000, 1 and 2, on all episodes: 0.003
# to 0.005 of the data's range, over three to nine times of which their actions reach).
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 2e-3), ("int8", 0.02)])
def test_what_lerobot_trains_acts_as_its_select_action(
    trained: Path, pusht: Path, tmp_path: Path, precision: Precision, limit: float
) -> None:
    data = str(pusht) if precision == "int8" else None
    config = ExportConfig(
        str(trained), tmp_path / "a.bundle", precision, calibration_data=data,
        calibration_steps=64, verify_data=str(pusht), verify_steps=64,
    )  # fmt: skip
    export(config)
    assert EdgePolicy.load(tmp_path / "a.bundle").manifest.source.layout == "0.4+"
    agree(trained, tmp_path / "a.bundle", pusht, limit)


@pytest.mark.parametrize("mode", ["MEAN_STD", "QUANTILES"])
def test_what_we_train_lerobot_evaluates(pusht: Path, tmp_path: Path, mode: str) -> None:
    scale = NormalizationMode[mode]
    directory = train(
        TrainConfig(
            dataset=str(pusht), output=tmp_path / "run", steps=6, n_vqvae_training_steps=3,
            batch_size=4, gpt_n_layer=1, n_obs_steps=2, use_group_norm=False,
            normalization_mapping={"VISUAL": scale, "STATE": scale, "ACTION": scale},
        )
    )  # fmt: skip
    export(ExportConfig(str(directory), tmp_path / "a.bundle", verify_steps=16))
    agree(directory, tmp_path / "a.bundle", pusht, 1e-4)
    lerobot_command(
        "lerobot_eval",
        f"--policy.path={directory}", "--env.type=pusht", "--env.episode_length=20",
        "--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false",
        "--policy.device=cpu", f"--output_dir={tmp_path / 'eval'}",
        cwd=tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2


def test_relative_actions_are_lerobots(pusht: Path, tmp_path: Path) -> None:
    """Its processors, as the checkpoint describes them, there and back."""
    directory = train(
        TrainConfig(
            dataset=str(pusht), output=tmp_path / "run", steps=4, n_vqvae_training_steps=2,
            batch_size=4, gpt_n_layer=1, n_obs_steps=1, n_action_pred_token=1,
            use_relative_actions=True, relative_exclude_joints=("Y",),
        )
    )  # fmt: skip
    modeling = oracle.lerobot("policies.vqbet.modeling_vqbet")
    with pytest.raises(Exception, match="use_relative_actions"):
        modeling.VQBeTPolicy.from_pretrained(directory)
    before, after = oracle.lerobot("policies.factory").make_pre_post_processors(
        modeling.VQBeTConfig(), pretrained_path=str(directory)
    )
    checkpoint, dataset = load_checkpoint(str(directory)), LeRobotDataset.open(pusht)
    policy = checkpoint.config
    assert policy.relative_actions == (True, False)
    data = WindowedDataset(dataset, policy, Scalings.of(dataset, policy), torch.device("cpu"))
    states, actions = dataset.column(STATE), dataset.column("action")
    for frame in (0, 40, 120):
        raw = torch.from_numpy(actions[frame : frame + policy.action_chunk_size])[None]
        state = torch.from_numpy(states[frame])[None]
        batch = before({STATE: state, CAMERA: torch.zeros(1, 3, 96, 96), "action": raw})
        chunk = data.chunks(np.array([frame]))[:, 0]
        torch.testing.assert_close(batch["action"], chunk, atol=1e-5, rtol=0)
        own = checkpoint.action_scaling.apply(chunk[0].numpy(), batch[STATE][0].numpy())
        np.testing.assert_allclose(own, after(chunk[0]).numpy(), atol=1e-3)
        np.testing.assert_allclose(own, raw[0], atol=1e-3)


def test_the_whole_data_set_reads_as_lerobots(pusht: Path, tmp_path: Path) -> None:
    """Every number and every pixel of every video frame."""
    copy = Path(shutil.copytree(pusht, tmp_path / "pusht"))
    theirs: Any = oracle.lerobot("datasets.lerobot_dataset").LeRobotDataset(
        "local/pusht", root=copy, video_backend="pyav"
    )
    ours = LeRobotDataset.open(copy)
    assert len(theirs) == ours.num_frames
    frames = ours.frames(CAMERA)
    worst = 0
    for index in range(len(theirs)):
        row = theirs[index]
        for key in (STATE, "action"):
            np.testing.assert_array_equal(row[key].numpy(), ours.column(key)[index])
        pixels = (row[CAMERA].permute(1, 2, 0) * 255).round().to(torch.int16).numpy()
        worst = max(worst, int(np.abs(pixels - frames[index]).max()))
    assert worst == 0
