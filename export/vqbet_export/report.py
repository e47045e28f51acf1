"""`report.json` and `report.md`: what was verified, on what, with which figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from vqbet_calibration.quantize import Quantization

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.comparison import LIMITS
from vqbet_edge.runtime.manifest import STAGES, Manifest, Precision
from vqbet_export.verification import Verification


def report_data(
    manifest: Manifest,
    precision: Precision,
    results: Sequence[Verification],
    quantizations: Sequence[Quantization],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The report as plain data, with the fields' own names."""
    return {
        "source": msgspec.to_builtins(manifest.source),
        "precision": precision,
        "tools": manifest.tools,
        "limits": asdict(LIMITS[precision]),
        "notes": list(notes),
        "results": [asdict(result) for result in results],
        "quantization": [found.report() for found in quantizations],
    }


def report_markdown(data: Mapping[str, Any], bundle: Bundle) -> str:
    """The report as Markdown tables."""
    source = data["source"]
    lines = [
        f"# Verification of {source['name']}",
        "",
        f"Precision {data['precision']}, compared with the network in PyTorch (float32).",
        f"The checkpoint is {bundle.manifest.source.writer}'s, with SHA-256 `{source['sha256']}`.",
    ]
    lines += ["", *(f"- {note}" for note in data["notes"])]
    for result in data["results"]:
        target = result["target"]
        graphs = "" if target is None else f", graphs for {target}"
        graph = bundle.cpu_graph if target == "cpu" else bundle.graph
        sizes = {str(name): f"{len(graph(name)) / 1e6:.1f}" for name in STAGES}
        heading = f"## On {result['samples']} {result['observations']} observations{graphs}"
        lines += ["", heading, "", *_stage_table(result["stages"], sizes)]
        lines += ["", *_policy_table(result["whole"])]
    limits = {name: limit for name, limit in data["limits"].items() if limit is not None}
    lines += ["", "## Limits", "", *(f"- {k.replace('_', ' ')}: {v:g}" for k, v in limits.items())]
    for found in data["quantization"]:
        lines += _quantization(found)
    lines += ["", "## Made with", "", *(f"- {k} {v}" for k, v in data["tools"].items()), ""]
    return "\n".join(lines)


def _stage_table(stages: Mapping[str, Mapping[str, float]], sizes: Mapping[str, str]) -> list[str]:
    lines = [
        "| each graph alone | MB | largest error | relative | of what varies | gain | cosine |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in stages.items():
        figures = row["max_error"], row["relative_error"], _of_what_varies(row)
        errors = " | ".join(f"{figure:.2e}" for figure in figures)
        exact = f"{row['gain']:.6f} | {row['cosine']:.7f}"
        lines.append(f"| {name} | {sizes.get(name, '')} | {errors} | {exact} |")
    return lines


def _of_what_varies(row: Mapping[str, float]) -> float:
    return row["varying"] / max(row["variation"], 1e-12)


def _policy_table(whole: Mapping[str, Any]) -> list[str]:
    policy = whole["policy"]
    return [
        "| whole policy, codes forced | |",
        "|---|---:|",
        f"| largest action error, in the action's units | {policy['action_error']:.3g} |",
        f"| ... relative to the spread of the actions, 99 % | {policy['action']:.2e} |",
        f"| ... and at most | {policy['largest_action']:.2e} |",
        f"| total variation of the code distribution, mean | {policy['total_variation']:.2e} |",
        f"| ... and at most | {policy['largest_variation']:.2e} |",
        f"| observations whose codes are clear of ties | {policy['clear']:.2%} |",
        f"| ... agreement of their most probable codes | {policy['code_agreement']:.2%} |",
        *(
            f"| {name}, behind those before it: relative error, of what varies, gain "
            f"| {row['relative_error']:.2e}, {_of_what_varies(row):.2e}, {row['gain']:.6f} |"
            for name, row in whole["stages"].items()
        ),
    ]


def _quantization(found: Mapping[str, Any]) -> Iterator[str]:
    """What quantising for a target cost, of `Quantization.report`."""
    figures = "action error | total variation | code agreement"
    total = _outcome(found["outcome"])
    yield from ("", f"## INT8 for {found['target']}", "", f"| against float32 | {figures} |")
    yield from ("|---|---:|---:|---:|", f"| on held-out observations | {total} |", "")
    yield from (f"Left in floating point: {', '.join(found['kept']) or 'nothing'}.", "")
    for stage, outcomes in found["by_method"].items():
        for method in list(outcomes)[:-1]:  # the last one is the cheapest
            names = [name for name, chosen in found["plan"][stage].items() if chosen == method]
            if names:
                yield from (f"In {stage} by {method}: {', '.join(names)}.", "")
    for note in found["notes"]:
        yield from (note, "")
    yield from (f"| stage | every layer by | {figures} | cosine |", "|---|---|---:|---:|---:|---:|")
    for stage, outcomes in found["by_method"].items():
        for method, outcome in outcomes.items():
            cosine = outcome["cosine"][stage]
            yield f"| {stage} | {method} | {_outcome(outcome)} | {cosine:.5f} |"
    yield from ("", "Each layer quantised alone, the most harmful first:", "")
    yield from (f"| layer | {figures} |", "|---|---:|---:|---:|")
    for entry in found["ranking"]:
        name = f"{entry['stage']}.{entry['layer']}"
        kept = " (kept)" if name in found["kept"] else ""
        yield f"| {name}{kept} | {_outcome(entry['outcome'])} |"


def _outcome(outcome: Mapping[str, float]) -> str:
    """Of the action's range in the mean; of the codes; of the codes."""
    error, variation = outcome["action_error"], outcome["total_variation"]
    return f"{error:.2e} | {variation:.2e} | {outcome['code_agreement']:.2%}"
