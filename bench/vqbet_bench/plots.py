"""The picture of a result: how the steps that predict are distributed."""

from pathlib import Path

import numpy as np

from vqbet_bench.results import Report


def plot(report: Report, path: Path) -> None:
    """Write a PNG with one histogram per policy, calls back to back."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = {r.name: np.array(r.samples("back_to_back", "replan")) * 1e3 for r in report.results}
    samples = np.concatenate([*found.values(), [1.0]])
    edges = np.geomspace(samples.min(), samples.max() * 1.001, 120).tolist()
    for name, milliseconds in found.items():
        axes.hist(milliseconds, bins=edges, histtype="stepfilled", alpha=0.5, label=name)
    axes.set(title="steps that predict a chunk", xlabel="milliseconds", ylabel="steps")
    axes.set_xscale("log")
    if found:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
