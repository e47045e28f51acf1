"""A checkpoint and its bundle as LeRobot's own commands run them; prints how they differ as JSON.

    python compare.py CHECKPOINT BUNDLE FIRST_SEED EPISODES

It runs in any Python that has LeRobot and the plugin, and does what `lerobot-eval` does: policies
come from `make_policy`, processors from `make_pre_post_processors`, episodes from `rollout`.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.envs.configs import PushtEnv
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.import_utils import register_third_party_plugins


class Greedy:
    """Stands in for torch.multinomial: takes the most probable codes and keeps them.

    LeRobot decides for every token of the window; what counts is the newest observation's.
    """

    def __init__(self, config: Any) -> None:
        self.codes: list[torch.Tensor] = []
        self._newest = config.n_obs_steps - 1
        self._tokens = config.n_obs_steps + config.n_action_pred_token - 1

    def multinomial(self, weights: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert num_samples == 1
        best = weights.argmax(dim=1, keepdim=True)
        self.codes.append(best.view(-1, self._tokens, 2)[:, self._newest])
        return best


class Contender:
    """A policy directory between the processors, as `lerobot-eval` loads it."""

    def __init__(self, path: str, env: PushtEnv, *overrides: str) -> None:
        config = PreTrainedConfig.from_pretrained(path, cli_overrides=list(overrides))
        config.pretrained_path = Path(path)
        self.policy: Any = make_policy(config, env_cfg=env)
        self.policy.eval()
        self.before, self.after = make_pre_post_processors(
            config,
            pretrained_path=path,
            preprocessor_overrides={
                "device_processor": {"device": str(config.device)},
                "rename_observations_processor": {"rename_map": {}},
            },
        )
        self._env = env

    def run(self, seeds: list[int]) -> dict[str, Any]:
        """Episodes of one environment per seed, all at once."""
        made = make_env(self._env, n_envs=len(seeds), use_async_envs=False)
        envs = next(iter(next(iter(made.values())).values()))
        outer = make_env_pre_post_processors(self._env, self.policy.config)
        try:
            return rollout(envs, self.policy, *outer, self.before, self.after, seeds)
        finally:
            envs.close()


def main() -> None:
    checkpoint, bundle = sys.argv[1:3]
    first, episodes = map(int, sys.argv[3:])
    register_third_party_plugins()
    env = PushtEnv()
    seeds = list(range(first, first + episodes))
    reference, compiled = Contender(checkpoint, env), Contender(bundle, env, "--temperature=0")
    greedy = Greedy(reference.policy.config)
    with mock.patch.object(torch, "multinomial", greedy.multinomial):
        expected = reference.run(seeds)
    found = compiled.run(seeds)
    said = {
        "policy": type(compiled.policy).__name__,
        "code_pairs": len(torch.cat(greedy.codes).unique(dim=0)),
        "action_error": float((found["action"] - expected["action"]).abs().max()),
        "expected": expected["reward"].tolist(),
        "rewards": found["reward"].tolist(),
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
