"""What LeRobot's own commands make of a bundle, beside LeRobot's own policy."""

import json
from pathlib import Path

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


@pytest.mark.extended
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
    rewards = np.array(found["expected"])
    assert rewards.shape == (EPISODES, 300)
    assert rewards.max(axis=1).min() > 0
    np.testing.assert_allclose(found["rewards"], rewards, rtol=1e-6)
    # Shorter, because the command films the episodes.
    command = f"""-m lerobot.scripts.lerobot_eval --policy.path={robot.bundle} --env.type=pusht
        --env.episode_length=60 --eval.n_episodes={EPISODES} --eval.batch_size={EPISODES}
        --eval.use_async_envs=false --seed={SEED} --policy.temperature=0
        --output_dir={tmp_path / "evaluated"}""".split()
    guards = '--policy.guards={"action_limits": "data", "margin": 0.2}'
    done = peer.run(*command, guards, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((tmp_path / "evaluated" / "eval_info.json").read_text())
    (task,) = info["per_task"]
    expected = rewards[:, :60].sum(axis=1)
    np.testing.assert_allclose(task["metrics"]["sum_rewards"], expected, rtol=1e-6)
    # What `vqbet-eval` runs.
    actor = Siblings(
        *load_backend(str(robot.bundle)), EPISODES, temperature=0, guards=Guards(margin=0.2)
    )
    seeds = range(SEED, SEED + EPISODES)
    episodes = run_episodes(make_task("pusht"), actor, seeds, slots=EPISODES)
    best = [episode.max_reward for episode in episodes]
    np.testing.assert_allclose(best, rewards.max(axis=1), rtol=1e-6)


@pytest.mark.extended
@pytest.mark.xdist_group("lerobot")
def test_training_is_refused(newest: Peer, robot: Robot, tmp_path: Path) -> None:
    options = [f"--policy.path={robot.bundle}", "--policy.push_to_hub=false"]
    data = ["--dataset.repo_id=local/pusht", f"--dataset.root={DATA}", "--wandb.enable=false"]
    done = newest.run("-m", "lerobot.scripts.lerobot_train", *options, *data, cwd=tmp_path)
    assert done.returncode != 0
    assert "a bundle acts and cannot be trained" in done.stderr.splitlines()[-1]
