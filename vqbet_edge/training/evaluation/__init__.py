"""How often a policy succeeds: environments, rollouts, comparison of two policies."""
