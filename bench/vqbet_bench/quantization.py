"""What precision costs: bundles of one checkpoint side by side, on observations and in closed loop.

    python -m vqbet_bench.quantization --checkpoint DIR --bundles A-fp32.bundle A-int8.bundle \
        --data DATASET [--env metaworld_push --episodes 50] --output DIR

writes `quantization.md`, `quantization.json` and `quantization.png`. The first bundle is what the
others are compared with in closed loop, on the same seeds.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from vqbet_calibration.samples import load_samples
from vqbet_export.onnx_graphs import TensorRTGraphs
from vqbet_export.verification import Verification, Verifier

from vqbet_edge import EdgePolicy
from vqbet_edge.cli import run
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.base import Backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import STAGES, Target
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.evaluation.actors import BundleActor
from vqbet_edge.training.evaluation.rollout import Episode, run_episodes
from vqbet_edge.training.evaluation.summary import Comparison, Summary, compare, summarize
from vqbet_edge.training.evaluation.tasks import ENV_HELP, make_task


@dataclass(frozen=True)
class Config:
    """Compare bundles of one checkpoint."""

    # The checkpoint that they were exported from.
    checkpoint: str
    # The bundles; the first one is the reference in closed loop.
    bundles: tuple[Path, ...]
    # A LeRobot data set or recordings; its verification part is used, as `--int8` leaves it out.
    data: str
    # Where the report goes.
    output: Path
    env: Annotated[str | None, tyro.conf.arg(help=ENV_HELP)] = None
    # Episodes to drive.
    episodes: int = 50
    # Seed of the first episode.
    seed: int = 100_000
    # Observations to sample; the same number as at the export gives the same ones.
    steps: int = 1024


@dataclass(frozen=True)
class Row:
    """One bundle.

    Attributes:
        name: of its directory, and whose graphs ran where there are two kinds.
        megabytes: of the four graphs that ran.
        verification: against PyTorch, on real observations.
        closed_loop: None without an environment.
        versus_first: the bundle minus the first one, on the same seeds.
    """

    name: str
    megabytes: float
    verification: Verification
    closed_loop: Summary | None
    versus_first: Comparison | None


def measure(config: Config) -> list[Row]:
    """Verify and drive every bundle; of an INT8 bundle, the graphs for each target."""
    checkpoint = load_checkpoint(config.checkpoint)
    bundles = [Bundle.open(path) for path in config.bundles]
    manifest = bundles[0].manifest
    scaling = Affine.from_arrays(bundles[0].arrays, "state", manifest.state_dim)
    samples = load_samples(config.data, manifest, scaling, config.steps)
    rows: list[Row] = []
    reference: list[Episode] = []
    for bundle in bundles:
        targets = bundle.manifest.targets
        for target in targets if bundle.manifest.calibration else (None,):
            verifier = Verifier(bundle, checkpoint, [target])
            verification = verifier.verify(samples.verification, "real")[0]
            episodes = _drive(config, bundle, target)
            reference = reference or episodes
            rows.append(_row(bundle, verification, episodes, reference))
    return rows


def _drive(config: Config, bundle: Bundle, target: Target | None) -> list[Episode]:
    if config.env is None:
        return []
    slots = min(8, config.episodes)
    policies = [EdgePolicy(bundle, _backend(bundle, target)) for _ in range(slots)]
    seeds = range(config.seed, config.seed + config.episodes)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{config.env}: {bundle.path.name}", total=config.episodes)
        return run_episodes(
            make_task(config.env),
            BundleActor(policies),
            seeds,
            slots=slots,
            on_end=lambda _: bar.advance(task),
        )


def _backend(bundle: Bundle, target: Target | None) -> Backend:
    if target == "tensorrt":
        return TensorRTGraphs(bundle)
    return create_backend("onnxruntime", bundle)


def _row(
    bundle: Bundle, verification: Verification, episodes: list[Episode], reference: list[Episode]
) -> Row:
    target, name = verification.target, bundle.path.name.removesuffix(".bundle")
    graph = bundle.cpu_graph if target == "cpu" else bundle.graph
    return Row(
        name=name if target is None else f"{name} ({target})",
        megabytes=sum(len(graph(stage)) for stage in STAGES) / 1e6,
        verification=verification,
        closed_loop=summarize(episodes) if episodes else None,
        versus_first=compare(reference, episodes) if episodes is not reference else None,
    )


def markdown(config: Config, rows: list[Row]) -> str:
    """The report; a column per bundle."""
    columns = {
        row.name: {
            "size, MB": f"{row.megabytes:.1f}",
            **{
                f"{stage}: smallest cosine": f"{result.cosine:.5f}"
                for stage, result in row.verification.stages.items()
            },
            **_policy(asdict(row.verification.policy)),
            **_closed_loop(row),
        }
        for row in rows
    }
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    lines = [
        "# Precisions side by side",
        "",
        f"{rows[0].verification.samples} real observations that nothing was chosen by, against "
        "PyTorch in float32."
        + (f" Closed loop: {config.episodes} episodes of {config.env}." if config.env else ""),
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(f"| {n} | {' | '.join(c.get(n, '') for c in columns.values())} |" for n in names),
        "",
        "![quantization](quantization.png)",
        "",
    ]
    return "\n".join(lines)


def _policy(figures: Mapping[str, float]) -> dict[str, str]:
    return {
        "largest action error, in the action's units": f"{figures['action_error']:.3g}",
        "... relative to the action's range": f"{figures['relative_action_error']:.2e}",
        "code agreement": f"{figures['code_agreement']:.2%}",
        "total variation of the codes": f"{figures['total_variation']:.2e}",
    }


def _closed_loop(row: Row) -> dict[str, str]:
    if row.closed_loop is None:
        return {}
    cells = {
        "success [95 %]": str(row.closed_loop.success),
        "highest reward [95 %]": str(row.closed_loop.max_reward),
    }
    if row.versus_first is not None:
        cells["success minus the first's, same seeds [95 %]"] = str(row.versus_first.success)
        cells["highest reward minus the first's [95 %]"] = str(row.versus_first.max_reward)
    return cells


def chart(rows: list[Row], path: Path) -> None:
    """Size, total variation, action error and success, a bar per bundle."""
    policies = [row.verification.policy for row in rows]
    panels = {
        "size, MB": [row.megabytes for row in rows],
        "total variation of the codes": [policy.total_variation for policy in policies],
        "largest action error, of its range": [policy.relative_action_error for policy in policies],
    }
    summaries = [row.closed_loop for row in rows if row.closed_loop is not None]
    figure = Figure(figsize=(3.2 * (len(panels) + bool(summaries)), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels) + bool(summaries))
    names = [row.name for row in rows]
    for axis, (title, values) in zip(axes, panels.items(), strict=False):
        axis.bar(names, values)
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", labelrotation=30, labelsize=7)
    if summaries:
        means = [s.success.mean for s in summaries]
        errors = [[s.success.mean - s.success.low for s in summaries],
                  [s.success.high - s.success.mean for s in summaries]]  # fmt: skip
        axes[-1].bar(names, means, yerr=errors, capsize=4)
        axes[-1].set_title("success, 95 % interval", fontsize=9)
        axes[-1].tick_params(axis="x", labelrotation=30, labelsize=7)
    figure.savefig(path, dpi=110)


def _main() -> None:
    config = tyro.cli(Config, prog="python -m vqbet_bench.quantization")
    rows = measure(config)
    config.output.mkdir(parents=True, exist_ok=True)
    data: list[dict[str, Any]] = [asdict(row) for row in rows]
    (config.output / "quantization.json").write_text(json.dumps(data, indent=2) + "\n")
    (config.output / "quantization.md").write_text(markdown(config, rows))
    chart(rows, config.output / "quantization.png")


if __name__ == "__main__":
    run(_main)
