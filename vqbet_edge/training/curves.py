"""Pictures of a run: its curves, and what the code pairs stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from vqbet_edge.training.config import ACTION_KEY
from vqbet_edge.training.files import writing
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings

mpl.use("Agg")
import matplotlib.pyplot as plt

# Panels of the curves: title, kind of record, metrics.
_PANELS = [
    ("stage 1: reconstruction (L1, normalised)", "stage 1", ["reconstruction"]),
    ("stage 1: code pairs in use", "codes", ["code_pairs_used"]),
    ("stage 2: focal losses", "stage 2", ["primary", "secondary"]),
    ("stage 2: predicted chunk (L1, normalised)", "stage 2", ["offset"]),
    ("stage 2: sampled code is the chunk's", "stage 2", ["primary_accuracy", "secondary_accuracy"]),
    ("learning rate", "stage 2", ["lr"]),
]


def draw_curves(metrics: Path, target: Path) -> None:
    """Training curves, validation dashed, from a metrics.jsonl."""
    records = read_metrics(metrics)
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), constrained_layout=True)
    for axis, (title, kind, names) in zip(axes.flat, _PANELS, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        for name in names:
            _line(axis, records, kind, name)
        if len(names) > 1:
            axis.legend()
    _finish(figure, target)


def draw_code_book(network: VQBeT, scalings: Scalings, target: Path) -> None:
    """Every code pair's action chunk: a panel per primary code, a line per secondary one.

    Chunks are drawn as paths of the first two action dimensions, or over time when there is one.
    """
    codes = network.config.vqvae_n_embed
    pairs = torch.cartesian_prod(torch.arange(codes), torch.arange(codes))
    with torch.no_grad():
        device = next(network.parameters()).device
        chunks = network.head.vqvae_model.decode(pairs.to(device)).float().cpu().numpy()
    back = scalings.backward[ACTION_KEY]
    chunks = (chunks - back.subtract) * back.multiply + back.add
    paths = chunks[..., :2].reshape(codes, codes, *chunks.shape[1:-1], -1)
    if paths.shape[-1] == 1:
        times = np.broadcast_to(np.arange(paths.shape[2])[:, None], paths.shape)
        paths = np.concatenate([times, paths], axis=-1)
    rows = int(np.ceil(np.sqrt(codes)))
    columns = -(-codes // rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2 * columns, 2 * rows), sharex=True, sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for primary, axis in enumerate(axes.flat[:codes]):
        axis.set_title(f"primary {primary}", fontsize=8)
        for path in paths[primary]:
            axis.plot(*path.T, ".-", linewidth=0.7, markersize=2)
    figure.suptitle("action chunk of every code pair, in the action's units")
    _finish(figure, target)


def _line(axis: Any, records: Sequence[dict[str, Any]], kind: str, name: str) -> None:  # noqa: ANN401
    color = None
    for suffix, style in (("", "-"), (" validation", "--")):
        points = [(r["step"], r[name]) for r in records if r["kind"] == kind + suffix and name in r]
        if points:
            (line,) = axis.plot(
                *zip(*points, strict=True), style, color=color, label=f"{name}{suffix}"
            )
            color = line.get_color()


def _finish(figure: Any, target: Path) -> None:  # noqa: ANN401
    with writing(target):
        figure.savefig(target, dpi=120)
    plt.close(figure)
