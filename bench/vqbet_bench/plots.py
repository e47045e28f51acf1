"""The picture of a result: how steps are distributed, and where the time goes."""

from pathlib import Path
from typing import Any

import numpy as np

from vqbet_bench.results import Report

# Runs before the step that predicts.
AHEAD = "prefill"


def plot(report: Report, path: Path) -> None:
    """Write a PNG: histograms of re-planning steps, and stacked bars of their stages."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    figure = Figure(figsize=(13, 5), layout="constrained")
    histogram, bars = figure.subplots(1, 2)
    _histogram(report, histogram)
    _bars(report, bars)
    figure.savefig(path, dpi=120)


def _histogram(report: Report, axes: Any) -> None:
    samples = {r.name: np.array(r.samples("back_to_back", "replan")) * 1e3 for r in report.results}
    samples = {name: values for name, values in samples.items() if len(values)}
    if samples:
        low = min(values.min() for values in samples.values())
        high = max(values.max() for values in samples.values())
        edges = np.geomspace(low, high * 1.001, 120)
        for name, values in samples.items():
            axes.hist(values, bins=edges, histtype="stepfilled", alpha=0.5, label=name)
        axes.set_xscale("log")
        axes.legend(fontsize=8)
    axes.set(title="steps that predict a chunk", xlabel="milliseconds", ylabel="steps")


def _bars(report: Report, axes: Any) -> None:
    names = []
    colors: dict[str, str] = {}
    for row, result in enumerate(report.results):
        names.append(result.name)
        total = (result.median_over_rounds("paced", "p50") or 0.0) * 1e3
        left = 0.0
        stages = result.stage_medians("paced")
        stages.pop(AHEAD, None)
        for stage, seconds in stages.items():
            label = stage if stage not in colors else None
            color = colors.setdefault(stage, f"C{len(colors)}")
            axes.barh(row, seconds * 1e3, left=left, color=color, label=label)
            left += seconds * 1e3
        axes.barh(row, max(0.0, total - left), left=left, color="lightgray")
        axes.annotate(f" {max(total, left):.1f}", (max(total, left), row), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(
        title="at the control rate; gray: outside the graphs",
        xlabel="milliseconds",
    )
    if colors:
        axes.legend(fontsize=8)
