"""`vqbet-eval`: how often a policy succeeds, for a checkpoint and for a bundle."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress

from vqbet_edge.cli import run
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.training.config import check_positive
from vqbet_edge.training.evaluation.actors import ActorOptions, load_actor
from vqbet_edge.training.evaluation.rollout import Episode, run_episodes
from vqbet_edge.training.evaluation.sheet import draw_sheet
from vqbet_edge.training.evaluation.summary import Comparison, Summary, compare, summarize
from vqbet_edge.training.evaluation.tasks import ENV_HELP, make_task


@dataclass(frozen=True)
class EvalConfig:
    """How often a policy succeeds in an environment, with fixed seeds.

    Raises:
        UsageError: a value is out of its range.
    """

    # A checkpoint's directory or a bundle.
    policy: Annotated[str, tyro.conf.Positional]
    env: Annotated[str, tyro.conf.arg(help=ENV_HELP)]
    # Episodes to run.
    episodes: int = 50
    # A second policy to compare with, on the same seeds.
    versus: str | None = None
    # Seed of the first episode; the others follow.
    seed: int = 100_000
    # Who runs a bundle.
    backend: BackendName = "auto"
    # Temperature of the code distribution; none takes the policy's, 0 is greedy.
    temperature: float | None = None
    # Predict anew after so many actions; none executes whole chunks.
    replan_every: int | None = None
    # Environments that run at the same time.
    num_envs: int = 8
    # Give every environment a process of its own.
    processes: bool = False
    # Write a contact sheet of the first episodes to this PNG file.
    sheet: Path | None = None
    # Print JSON instead of text.
    json: bool = False

    def __post_init__(self) -> None:
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


def evaluate(config: EvalConfig) -> Result:
    """Run the evaluation; progress goes to stderr.

    Raises:
        UsageError: the environment is unknown or not installed.
        CheckpointError, BundleError: a policy cannot be loaded.
    """
    sources = [config.policy] + ([config.versus] if config.versus else [])
    runs = {source: _run(config, source) for source in sources}
    if config.sheet is not None:
        draw_sheet(runs[config.policy], config.sheet)
    compared = compare(runs[sources[0]], runs[sources[1]]) if len(runs) == 2 else None
    return Result(config.env, {s: summarize(e) for s, e in runs.items()}, compared)


def _run(config: EvalConfig, source: str) -> list[Episode]:
    make = make_task(config.env)
    slots = min(config.num_envs, config.episodes)
    options = ActorOptions(config.backend, config.temperature, config.replan_every)
    actor = load_actor(source, slots, options)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{config.env}: {source}", total=config.episodes)
        return run_episodes(
            make,
            actor,
            range(config.seed, config.seed + config.episodes),
            slots=slots,
            processes=config.processes,
            keep_frames=8 if config.sheet else 0,
            on_end=lambda _: bar.advance(task),
        )


def _text(result: Result) -> str:
    lines = []
    for source, summary in result.policies.items():
        lines += [
            f"{source} in {result.env}, {summary.episodes} episodes",
            f"  success         {summary.success}",
            f"  maximum reward  {summary.max_reward}",
            f"  steps           {summary.mean_steps:.1f}",
        ]
    if result.comparison is not None:
        change = result.comparison
        lines += [
            "second minus first, same seeds",
            f"  success         {change.success}",
            f"  maximum reward  {change.max_reward}",
            f"  solved by the first only   {change.only_first}",
            f"  solved by the second only  {change.only_second}",
        ]
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    config = tyro.cli(EvalConfig, prog="vqbet-eval")
    result = evaluate(config)
    found: dict[str, Any] = asdict(result)
    sys.stdout.write((json.dumps(found, indent=2) if config.json else _text(result)) + "\n")
