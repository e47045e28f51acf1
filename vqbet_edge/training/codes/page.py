"""The report as one HTML page: no script, nothing from elsewhere, readable on a phone."""

import base64
import io
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from vqbet_edge.training.codes.findings import LAYERS, Finding, known_use
from vqbet_edge.training.codes.report import CodesReport, Pair, Predictions
from vqbet_edge.training.codes.use import LayerUse

# So many episodes' entropies are drawn, and so many pairs' chunks, side by side.
TRACES, CHUNKS, BESIDE = 6, 60, 5
BLUE, ORANGE, GREY, RED = "#2f6db3", "#d9822b", "#b8c0c8", "#c23b3b"
# Inches, so that text is readable on a page as wide as a phone.
WIDTH = 4.6
# The same report makes the same bytes.
_STYLE: dict[Any, Any] = {"svg.hashsalt": "vqbet", "font.size": 9, "axes.titlesize": 9}
_NOTHING = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def render(report: CodesReport, findings: Sequence[Finding]) -> str:
    """The page."""
    layers, use_of = known_use(report)
    text = files(__package__).joinpath("page.html").read_text("utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    with mpl.rc_context(_STYLE):
        pictures = [(caption, _svg(figure)) for caption, figure in _figures(report, layers)]
    return template.render(
        report=report, findings=findings, layers=layers, use_of=use_of, pictures=pictures
    )


def _svg(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata=_NOTHING)
    return base64.b64encode(data.getvalue()).decode()


def _figures(report: CodesReport, layers: Sequence[LayerUse]) -> Iterator[tuple[str, Figure]]:
    found, predicted = report.demonstrations, report.predictions
    if layers:
        figure = _figure(3.0)
        for axes, name, layer in zip(figure.subplots(2), LAYERS, layers, strict=True):
            axes.bar(range(len(layer.counts)), layer.counts, color=BLUE)
            axes.plot(layer.dead, [0] * len(layer.dead), "x", color=RED)
            axes.set_title(f"{name} codes (x: dead)")
        yield "How often each code is used.", figure
    if found is not None:
        figure = _figure(3.9)
        axes = figure.subplots()
        # On the scale of a square root: what is rare shows too.
        axes.imshow(np.sqrt(found.use.pair_counts), cmap="Blues")
        for primary, secondary in (predicted and predicted.unseen) or ():
            axes.plot(secondary, primary, "x", color=RED, markersize=4)
        axes.set(xlabel="secondary code", ylabel="primary code")
        yield "How often each pair is used. Crosses: drawn, but in no demonstration.", figure
    if predicted is not None:
        yield _decisions(predicted)
        figure = _figure(3.0)
        axes = figure.subplots()
        axes.scatter(predicted.decoded, predicted.offset, s=4, color=BLUE, rasterized=True)
        axes.axline((0, 0), slope=1, linestyle="--", color=GREY)
        axes.set(xlabel="decoded chunk, from the mean one", ylabel="offset", xlim=0, ylim=0)
        caption = (
            "Is the code doing anything? Per step, what choosing the code changed and what the "
            "offset added (mean absolute values, the network's units). Dashed: as much."
        )
        yield caption, figure
    yield _chunks(report.pairs, (predicted and predicted.unseen) or ())


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _decisions(found: Predictions) -> tuple[str, Figure]:
    shown = found.episodes[:TRACES]
    figure = _figure(0.6 + 0.9 * len(shown))
    panels = figure.subplots(len(shown), squeeze=False)[:, 0]
    for axes, episode in zip(panels, shown, strict=True):
        axes.plot(episode.pair_entropy, color=GREY)
        axes.plot(episode.mode_entropy, color=BLUE)
        for step in np.flatnonzero(episode.modes > 1).tolist():
            axes.axvspan(step - 0.5, step + 0.5, color=ORANGE, alpha=0.3, linewidth=0)
        axes.set_ylabel(f"episode {episode.episode}")
    panels[-1].set_xlabel("step")
    caption = (
        "Entropy along episodes, in nats: blue of the modes, grey of the code pairs. Shaded: "
        "decision points, where more than one mode is live."
    )
    return caption, figure


def _chunks(pairs: Sequence[Pair], unseen: Sequence[tuple[int, int]]) -> tuple[str, Figure]:
    """A small picture of every chunk, all in one pair of axes and at one scale."""
    shown = pairs[:CHUNKS]
    chunks = np.stack([pair.chunk for pair in shown])  # (P, W, A)
    low, high = chunks.min(axis=(0, 1)), chunks.max(axis=(0, 1))
    planar = chunks.shape[-1] == 2
    # One scale for both dimensions of a plane, so that directions are true.
    wide = np.full(2, (high - low).max()) if planar else high - low
    inside = (chunks - low) / np.maximum(wide, np.finfo(np.float32).tiny) * 0.7
    rows = -(-len(shown) // BESIDE)
    figure = _figure(0.9 * rows + 0.2)
    axes = figure.subplots()
    for number, (pair, chunk) in enumerate(zip(shown, inside, strict=True)):
        down, right = divmod(number, BESIDE)
        times = np.linspace(0, 0.7, len(chunk))
        lines = [chunk] if planar else [np.stack([times, line], axis=1) for line in chunk.T]
        for i, line in enumerate(lines):
            axes.plot(
                *np.add(line, [right, down]).T,
                color=f"C{i}",
                marker="o",
                markersize=4,
                markevery=[0],
            )
        color = RED if (pair.primary, pair.secondary) in unseen else "black"
        axes.text(right, down + 0.85, f"{pair.primary}·{pair.secondary}", color=color, fontsize=8)
    axes.set(xlim=(-0.1, BESIDE - 0.1), ylim=(rows - 0.1, -0.1))
    axes.set_axis_off()
    way = "as a path of both action dimensions" if planar else "a line per action dimension"
    caption = (
        f"The decoded chunks of the {len(shown)} most used of {len(pairs)} pairs, {way}, from the "
        "dot on; primary and secondary code. Red: drawn, but in no demonstration."
    )
    return caption, figure
