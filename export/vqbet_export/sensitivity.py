"""What quantisation cost, layer by layer: tables for the report, and a bar chart."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

CHART_NAME = "sensitivity.png"
_SHOWN = 30


def quantization_markdown(quantizations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown about every target, from `Quantization.report`."""
    lines: list[str] = []
    for found in quantizations:
        outcome = found["outcome"]
        lines += ["", f"## INT8 for {found['target']}", ""]
        figures = (
            f"action error {outcome['action_error']:.2e} of its range in the mean, total "
            f"variation of the codes {outcome['total_variation']:.2e}, code agreement "
            f"{outcome['code_agreement']:.2%}"
        )
        lines += [
            f"On held-out observations, against the float32 graphs: {figures}.",
            "",
            f"Left in floating point: {', '.join(found['kept']) or 'nothing'}.",
            "",
            *_exact_layers(found),
            *(line for note in found["notes"] for line in (note, "")),
            *_method_table(found),
            "",
            "Each layer quantised alone, the most harmful first:",
            "",
            *_ranking_table(found),
        ]
    return [*lines, "", f"![sensitivity]({CHART_NAME})"] if quantizations else []


def _exact_layers(found: Mapping[str, Any]) -> list[str]:
    """Layers for which the cheapest method of their stage was too coarse."""
    lines: list[str] = []
    for stage, outcomes in found["by_method"].items():
        for method in list(outcomes)[1:]:
            names = [name for name, chosen in found["plan"][stage].items() if chosen == method]
            if names:
                lines += [f"In {stage} by {method}: {', '.join(names)}.", ""]
    return lines


def _method_table(found: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {stage} | {method} "
        f"| {o['action_error']:.2e} | {o['total_variation']:.2e} | {o['code_agreement']:.2%} "
        f"| {o['cosine'][stage]:.5f} |"
        for stage, outcomes in found["by_method"].items()
        for method, o in outcomes.items()
    ]
    return [
        "| stage | every layer by | action error | total variation | code agreement | cosine |",
        "|---|---|---:|---:|---:|---:|",
        *rows,
    ]


def _ranking_table(found: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {_name(entry)}{' (kept)' if _name(entry) in found['kept'] else ''} "
        f"| {entry['outcome']['action_error']:.2e} | {entry['outcome']['total_variation']:.2e} "
        f"| {entry['outcome']['code_agreement']:.2%} |"
        for entry in found["ranking"]
    ]
    header = ["| layer | action error | total variation | code agreement |", "|---|---:|---:|---:|"]
    return [*header, *rows]


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['stage']}.{entry['layer']}"


def sensitivity_chart(quantizations: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the most harmful layers of every target."""
    rows = min(_SHOWN, max(len(found["ranking"]) for found in quantizations))
    size = (7.0 * len(quantizations), 1.5 + 0.22 * rows)
    figure = Figure(figsize=size, layout="constrained")
    for found, axes in zip(
        quantizations, figure.subplots(1, len(quantizations), squeeze=False)[0], strict=True
    ):
        entries = found["ranking"][:_SHOWN][::-1]
        names = [_name(e) + (" *" if _name(e) in found["kept"] else "") for e in entries]
        actions = [entry["outcome"]["action_error"] for entry in entries]
        variations = [entry["outcome"]["total_variation"] for entry in entries]
        axes.barh(names, variations, label="total variation of the codes")
        axes.barh(names, actions, left=variations, label="action error, of its range")
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(f"INT8 for {found['target']}, one layer at a time (* kept)")
        axes.legend(loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
