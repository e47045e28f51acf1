"""The report's plots, each as SVG text in the colours of the page."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vqbet_edge.training.codes.facts import (
    Demonstrations,
    EpisodeTrace,
    Offsets,
    Pair,
    Reconstruction,
)
from vqbet_edge.training.codes.findings import LAYERS
from vqbet_edge.training.codes.use import Confusion, Floats, LayerUse

BLUE, ORANGE, GREY, RED = "#2f6db3", "#d9822b", "#b8c0c8", "#c23b3b"
_COLORS = [BLUE, ORANGE, "#4c9a5b", RED, "#7b5ea7", "#8c6d4f", "#3aa3a3", "#667788"]
# Inches, so that text is readable on a page as wide as a phone.
WIDTH, HEIGHT = 4.6, 3.0
# So many pairs' motion is drawn.
MOVING = 24
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vqbet",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_NOTHING = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _svg(draw: Callable[[Figure], None], width: float = WIDTH, height: float = HEIGHT) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        # Without metadata: the same report makes the same bytes.
        figure.savefig(text, format="svg", metadata=_NOTHING)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def use(layers: tuple[LayerUse, LayerUse]) -> str:
    """How often each code is used, dead ones marked."""

    def draw(figure: Figure) -> None:
        for axes, name, layer in zip(figure.subplots(2), LAYERS, layers, strict=True):
            axes.bar(range(len(layer.counts)), layer.counts, color=BLUE)
            if layer.dead:
                axes.plot(layer.dead, [0] * len(layer.dead), "x", color=RED)
            axes.set_title(f"{name} codes (x: dead)")

    return _svg(draw)


def pairs(counts: NDArray[np.number], unseen: Sequence[tuple[int, int]]) -> str:
    """How often each pair is used (C, C), and which are drawn without being."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _matrix(axes, counts)
        if unseen:
            rows, columns = np.array(unseen).T
            axes.plot(columns + 0.5, rows + 0.5, "x", color=RED, markersize=4)
        axes.set(xlabel="secondary code", ylabel="primary code")

    return _svg(draw, height=WIDTH * 0.85)


def reconstruction(found: Demonstrations, lost: Reconstruction) -> str:
    """What is left of the spread per action dimension."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        whole = np.maximum(found.spread, np.finfo(np.float32).tiny)
        places = np.arange(len(whole))
        axes.bar(places - 0.2, lost.primary / whole, 0.38, color=ORANGE, label="primary code only")
        axes.bar(places + 0.2, lost.both / whole, 0.38, color=BLUE, label="both codes")
        axes.axhline(1, color=GREY, linestyle="--")
        axes.set(xlabel="action dimension", ylabel="error / spread", xticks=places)
        axes.legend(frameon=False)

    return _svg(draw)


def offsets(found: Offsets) -> str:
    """A point per step: what choosing a code changes, and what the offset adds."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.scatter(found.decoded, found.offset, s=4, color=BLUE, alpha=0.4, rasterized=True)
        end = float(max(found.decoded.max(), found.offset.max()))
        axes.plot([0, end], [0, end], "--", color=GREY)
        axes.set(xlabel="decoded chunk, from the mean one", ylabel="offset")
        axes.text(end, end, "as large", ha="right", va="top", color="#667")

    return _svg(draw)


def confusion(layers: tuple[Confusion, Confusion]) -> str:
    """True codes by row, most probable ones by column."""

    def draw(figure: Figure) -> None:
        for axes, name, layer in zip(figure.subplots(1, 2), LAYERS, layers, strict=True):
            _matrix(axes, layer.counts)
            axes.set(title=f"{name}: {layer.accuracy:.0%} right", xlabel="predicted")
        figure.axes[0].set_ylabel("true")

    return _svg(draw, height=2.6)


def transitions(counts: NDArray[np.int64]) -> str:
    """Shares of the codes that follow a code, one chunk later."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _matrix(axes, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
        axes.set(xlabel="primary code one chunk later", ylabel="primary code")

    return _svg(draw, height=WIDTH * 0.85)


def trace(episode: EpisodeTrace) -> str:
    """Entropy along an episode, forks shaded."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(episode.pair_entropy, color=GREY, linewidth=1)
        axes.plot(episode.mode_entropy, color=BLUE, linewidth=1.4)
        axes.axhline(np.log(2), color=GREY, linestyle=":", linewidth=0.8)
        for start, stop, _ in episode.forks:
            axes.axvspan(start - 0.5, stop - 0.5, color=ORANGE, alpha=0.3, linewidth=0)
        axes.set(xlabel="step", ylabel="entropy", ylim=(-0.05, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _svg(draw, height=1.5)


def motion(listed: Sequence[Pair], found: Demonstrations | None) -> str:
    """Jerk and reversals of the most used pairs' chunks, the demonstrations' means dashed."""
    shown = listed[:MOVING]
    means = (None, None) if found is None else (found.jerk, found.reversals)

    def draw(figure: Figure) -> None:
        values = [[p.jerk or 0 for p in shown], [p.reversals or 0 for p in shown]]
        labels = [f"{p.primary}·{p.secondary}" for p in shown]
        panels = zip(
            figure.subplots(2, sharex=True), ("jerk", "reversals"), values, means, strict=True
        )
        for axes, name, heights, mean in panels:
            axes.bar(range(len(shown)), heights, color=BLUE)
            axes.set_ylabel(name)
            if mean is not None:
                axes.axhline(mean, color=ORANGE, linestyle="--")
        axes.set_xticks(range(len(shown)), labels, rotation=90, fontsize=7)

    return _svg(draw)


def _matrix(axes: Axes, values: NDArray[np.number]) -> None:
    """Darker is more, on the scale of a square root: what is rare shows too."""
    axes.pcolormesh(np.sqrt(values), cmap="Blues", rasterized=True)
    axes.set(aspect="equal")
    ticks = np.unique(np.linspace(0, len(values) - 1, 5).round().astype(int))
    axes.set_xticks(ticks + 0.5, [str(t) for t in ticks])
    axes.set_yticks(ticks + 0.5, [str(t) for t in ticks])
    axes.invert_yaxis()


def chunk(pair: Pair, low: Floats, high: Floats) -> str:
    """A small picture of one chunk, in SVG of its own.

    Two action dimensions are a path in their plane, which begins at the dot; others are lines
    over time.

    Args:
        pair: with the chunk (W, A).
        low: (A,), the least that all pictures of the page have room for.
        high: (A,), the most.
    """
    wide: Floats = np.maximum(high - low, np.finfo(np.float32).tiny)
    under = ""
    if len(low) == 2:
        # One scale for both, so that directions are true.
        middle, side = (low + high) / 2, float(wide.max())
        lines = [(pair.chunk - middle) / side * 84 + 50]
        x, y = -middle / side * 84 + 50
        if 0 < x < 100 and 0 < y < 100:  # else zero is out of the picture
            under = f'<path d="M{x:.1f} 0V100M0 {y:.1f}H100" stroke="#d8dde2"/>'
    else:
        across = np.linspace(6, 94, len(pair.chunk)) if len(pair.chunk) > 1 else np.array([50.0])
        down = 94 - (pair.chunk - low) / wide * 88
        lines = [np.stack([across, values], axis=1) for values in down.T]
    drawn = "".join(_line(points, _COLORS[i % len(_COLORS)]) for i, points in enumerate(lines))
    title = f"code pair {pair.primary}, {pair.secondary}"
    return (
        f'<svg viewBox="0 0 100 100" role="img" aria-label="{title}">'
        f'<rect width="100" height="100" rx="6" fill="#f3f5f7"/>{under}{drawn}</svg>'
    )


def _line(points: Floats, color: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[0]
    return (
        f'<polyline points="{text}" fill="none" stroke="{color}" stroke-width="2.4" '
        f'stroke-linecap="round"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
    )
