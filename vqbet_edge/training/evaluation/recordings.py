"""`vqbet-eval --record`: a recording of every episode, and an index with failures first."""

from contextlib import ExitStack
from pathlib import Path

from vqbet_edge.errors import UsageError
from vqbet_edge.training.evaluation.actors import Floats, Observations, Siblings
from vqbet_edge.training.evaluation.rollout import Episode
from vqbet_edge.training.files import replace_bytes, writing
from vqbet_edge.view.episodes import INDEX_NAME, EpisodeIndex, EpisodeOutcome


class RecordingActor:
    """An actor whose episodes are recorded: `failed_SEED` and `solved_SEED` in a folder.

    One that has not ended is called `running_SEED`. `episodes.json` lists those that have.

    Args:
        actor: who acts.
        folder: where to; empty, or made.
        env: the environment's name.
        policy: the policy's name.
        seeds: of the episodes; others, of idle slots, are not recorded.

    Raises:
        UsageError: the folder is not empty.
        DiskError: the folder cannot be made.
    """

    def __init__(self, actor: Siblings, folder: Path, env: str, policy: str, seeds: range) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UsageError(f"--record {folder} is not empty; choose another folder")
        self._actor, self._folder = actor, folder
        self._env, self._policy = env, policy
        self._waiting = set(seeds)
        self._open: dict[int, ExitStack] = {}
        self._outcomes: list[EpisodeOutcome] = []

    def reset(self, slot: int, seed: int) -> None:
        """See `Actor`."""
        self._actor.reset(slot, seed)
        if seed in self._waiting:
            self._waiting.remove(seed)
            stack = ExitStack()
            policy, folder = self._actor.policies[slot], self._folder / f"running_{seed}"
            stack.enter_context(policy.record(folder, decisions=True))
            self._open[seed] = stack

    def act(self, observations: Observations) -> Floats:
        """See `Actor`."""
        return self._actor.act(observations)

    def ended(self, episode: Episode) -> None:
        """Finish an episode's recording.

        Raises:
            DiskError: it could not be written whole.
        """
        name = f"{'solved' if episode.success else 'failed'}_{episode.seed}"
        running = self._folder / f"running_{episode.seed}"
        self._open.pop(episode.seed).close()
        with writing(running):
            running.rename(self._folder / name)
        self._outcomes.append(
            EpisodeOutcome(name, episode.seed, episode.success, episode.max_reward, episode.steps)
        )
        index = EpisodeIndex.of(self._env, self._policy, self._outcomes)
        replace_bytes(self._folder / INDEX_NAME, index.encode())

    def close(self) -> None:
        """Write what has been recorded of episodes that have not ended."""
        with ExitStack() as all_of_them:
            for stack in self._open.values():
                all_of_them.push(stack)
            self._open = {}
