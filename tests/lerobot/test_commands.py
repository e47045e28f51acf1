"""What LeRobot's own commands make of a bundle, beside LeRobot's own policy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from peers import PUSHT, Peer, Robot

from vqbet_edge import Guards
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.evaluation.actors import Siblings
from vqbet_edge.training.evaluation.rollout import run_episodes
from vqbet_edge.training.evaluation.tasks import make_task

COMPARE = Path(__file__).with_name("compare.py")
DATA = Path(__file__).parents[1] / "data" / "pusht"
# Episodes in which the untrained policy is rewarded.
SEED, EPISODES = 1002, 2


def test_acts_as_lerobots_own_policy(peer: Peer, robot: Robot, tmp_path: Path) -> None:
    """Two environments at once, whole episodes of greedy codes."""
    arguments = [COMPARE, robot.checkpoint, robot.bundle, str(SEED), str(EPISODES)]
    done = peer.run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    stats = oracle.make_statistics(PUSHT)[oracle.ACTION]
    limit = 1e-4 * float((stats["max"] - stats["min"]).min())
    assert found["policy"] == "VqbetEdgePolicy"
    assert found["code_pairs"] >= 3
    assert found["action_error"] <= limit
    assert found["probability_error"] <= 1e-3
    assert found["closed_action_error"] <= limit
    rewards = np.array(found["rewards"])
    assert rewards.shape == (EPISODES, 300)
    assert rewards.max(axis=1).min() > 0
    np.testing.assert_allclose(found["closed_rewards"], rewards, rtol=1e-6)
    evaluated_by_lerobots_command(peer, robot, tmp_path, rewards)
    evaluated_by_ours(robot, rewards)


def evaluated_by_lerobots_command(
    peer: Peer, robot: Robot, folder: Path, rewards: np.ndarray[Any, Any]
) -> None:
    """`lerobot-eval --policy.path=NAME.bundle`; shorter, because it films the episodes."""
    steps = 60
    command = ["-m", "lerobot.scripts.lerobot_eval", f"--policy.path={robot.bundle}"]
    options = [
        "--env.type=pusht",
        f"--env.episode_length={steps}",
        f"--eval.n_episodes={EPISODES}",
        f"--eval.batch_size={EPISODES}",
        "--eval.use_async_envs=false",
        f"--seed={SEED}",
        "--policy.temperature=0",
        '--policy.guards={"action_limits": "data", "margin": 0.2}',
        f"--output_dir={folder / 'evaluated'}",
    ]
    done = peer.run(*command, *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((folder / "evaluated" / "eval_info.json").read_text())
    (task,) = info["per_task"]
    expected = rewards[:, :steps].sum(axis=1)
    np.testing.assert_allclose(task["metrics"]["sum_rewards"], expected, rtol=1e-6)


def evaluated_by_ours(robot: Robot, rewards: np.ndarray[Any, Any]) -> None:
    """What `vqbet-eval` runs."""
    actor = Siblings(
        *load_backend(str(robot.bundle)), EPISODES, temperature=0, guards=Guards(margin=0.2)
    )
    seeds = range(SEED, SEED + EPISODES)
    episodes = run_episodes(make_task("pusht"), actor, seeds, slots=EPISODES)
    found = [episode.max_reward for episode in episodes]
    np.testing.assert_allclose(found, rewards.max(axis=1), rtol=1e-6)


@pytest.mark.xdist_group("lerobot")
def test_training_is_refused(newest: Peer, robot: Robot, tmp_path: Path) -> None:
    options = [f"--policy.path={robot.bundle}", "--policy.push_to_hub=false"]
    data = ["--dataset.repo_id=local/pusht", f"--dataset.root={DATA}", "--wandb.enable=false"]
    done = newest.run("-m", "lerobot.scripts.lerobot_train", *options, *data, cwd=tmp_path)
    assert done.returncode != 0
    assert "a bundle acts and cannot be trained" in done.stderr.splitlines()[-1]
