"""`vqbet-eval`: how often a policy succeeds, for a checkpoint and for a bundle."""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from vqbet_edge.cli import parse, run
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.config import check_positive
from vqbet_edge.training.evaluation.actors import Siblings
from vqbet_edge.training.evaluation.recordings import RecordingActor
from vqbet_edge.training.evaluation.replay import Replay, replay
from vqbet_edge.training.evaluation.rollout import Episode, run_episodes
from vqbet_edge.training.evaluation.summary import Comparison, Summary, compare, summarize
from vqbet_edge.training.evaluation.tasks import ENV_HELP, make_task


@dataclass(frozen=True)
class EvalConfig:
    """How often a policy succeeds in an environment, with fixed seeds.

    Raises:
        UsageError: a value is out of its range.
    """

    # A checkpoint or a bundle: a directory or a Hub id (user/name, user/name@revision).
    policy: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    env: Annotated[str | None, tyro.conf.arg(help=ENV_HELP, metavar="ENV")] = None
    # Instead of an environment: a folder that --record or `policy.record(..., decisions=True)`
    # wrote. Its decisions are made again by the policy, and the first that differs is listed.
    replay: Path | None = None
    # Record every episode with its decisions here, for vqbet-view.
    record: Path | None = None
    # Episodes to run.
    episodes: int = 50
    # A second policy to compare with, on the same seeds.
    versus: Annotated[str | None, tyro.conf.arg(metavar="POLICY")] = None
    # Seed of the first episode; the others follow.
    seed: int = 100_000
    # Who runs a bundle.
    backend: BackendName = "auto"
    # Temperature of the code distribution; none takes the policy's, 0 is greedy.
    temperature: float | None = None
    # Predict anew after so many actions; none executes whole chunks.
    replan_every: int | None = None
    # Keep actions within the demonstrated range and a margin, as on a robot.
    guards: bool = True
    # Environments that run at the same time.
    num_envs: int = 8
    # Give every environment a process of its own.
    processes: bool = False
    # Print JSON instead of text.
    json: bool = False

    def __post_init__(self) -> None:
        if (self.env is None) == (self.replay is None):
            raise UsageError("expected --env NAME or --replay FOLDER, one of both")
        driving = ("record", "versus", "temperature", "replan_every")
        given = [name for name in driving if getattr(self, name) is not None]
        if self.replay is not None and given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} does not go with --replay, which decides as the "
                "recording says"
            )
        replan = () if self.replan_every is None else ("replan_every",)
        check_positive(self, "episodes", "num_envs", *replan)
        if self.temperature is not None and not self.temperature >= 0:
            raise UsageError(f"--temperature must not be negative, got {self.temperature}")


@dataclass(frozen=True)
class Result:
    """Everything that an evaluation found."""

    env: str
    policies: dict[str, Summary]
    comparison: Comparison | None

    def __str__(self) -> str:
        """For people."""
        lines = []
        for source, summary in self.policies.items():
            lines += [
                f"{source} in {self.env}, {summary.episodes} episodes",
                f"  success         {summary.success}",
                f"  maximum reward  {summary.max_reward}",
                f"  steps           {summary.mean_steps:.1f}",
            ]
        if self.comparison is not None:
            change = self.comparison
            lines += [
                "second minus first, same seeds",
                f"  success         {change.success}",
                f"  maximum reward  {change.max_reward}",
                f"  solved by the first only   {change.only_first}",
                f"  solved by the second only  {change.only_second}",
            ]
        return "\n".join(lines)


def evaluate(config: EvalConfig, env: str) -> Result:
    """Run the evaluation in an environment; progress goes to stderr.

    Raises:
        UsageError: the environment is unknown or not installed.
        CheckpointError, BundleError: a policy cannot be loaded.
        DiskError: a recording cannot be written.
    """
    sources = [config.policy] + ([config.versus] if config.versus else [])
    runs = {source: _run(config, env, source) for source in sources}
    compared = compare(*runs.values()) if len(runs) == 2 else None
    return Result(env, {s: summarize(e) for s, e in runs.items()}, compared)


def _run(config: EvalConfig, env: str, source: str) -> list[Episode]:
    make = make_task(env)
    slots = min(config.num_envs, config.episodes)
    seeds = range(config.seed, config.seed + config.episodes)
    siblings = Siblings(
        *load_backend(source, config.backend),
        slots,
        temperature=config.temperature,
        replan_every=config.replan_every,
        guards=None if config.guards else Guards(action_limits=None),
    )
    with ExitStack() as stack:
        recording: RecordingActor | None = None
        if config.record is not None and source == config.policy:
            recording = RecordingActor(siblings, config.record, env, source, seeds)
            stack.callback(recording.close)
        bar = stack.enter_context(Progress(console=Console(stderr=True)))
        task = bar.add_task(f"{env}: {source}", total=config.episodes)

        def on_end(episode: Episode) -> None:
            if recording is not None:
                recording.ended(episode)
            bar.advance(task)

        actor = recording or siblings
        return run_episodes(
            make, actor, seeds, slots=slots, processes=config.processes, on_end=on_end
        )


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    config = parse(EvalConfig, "vqbet-eval")
    found: Result | Replay
    if config.env is not None:
        found = evaluate(config, config.env)
    elif config.replay is not None:
        found = replay(config.replay, config.policy, config.backend)
    sys.stdout.write((json.dumps(asdict(found), indent=2) if config.json else str(found)) + "\n")
