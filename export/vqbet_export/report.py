"""`report.json` and `report.md`: what was verified, on what, with which figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from vqbet_calibration.quantize import Quantization

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.comparison import LIMITS
from vqbet_edge.runtime.manifest import STAGES, Manifest, Precision, StageName
from vqbet_export.sensitivity import quantization_markdown
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
        f"The checkpoint has LeRobot's {source['layout']} layout and SHA-256 `{source['sha256']}`.",
    ]
    lines += ["", *(f"- {note}" for note in data["notes"])]
    for result in data["results"]:
        target = result["target"]
        graphs = "" if target is None else f", graphs for {target}"
        graph = bundle.cpu_graph if target == "cpu" else bundle.graph
        sizes = {name: len(graph(name)) for name in STAGES}
        heading = f"## On {result['samples']} {result['observations']} observations{graphs}"
        lines += ["", heading, "", *_stage_table(result["stages"], sizes)]
        lines += ["", *_policy_table(result["whole"])]
    limits = {name: limit for name, limit in data["limits"].items() if limit is not None}
    lines += ["", "## Limits", "", *(f"- {k.replace('_', ' ')}: {v:g}" for k, v in limits.items())]
    lines += quantization_markdown(data["quantization"])
    lines += ["", "## Made with", "", *(f"- {k} {v}" for k, v in data["tools"].items()), ""]
    return "\n".join(lines)


def _stage_table(
    stages: Mapping[str, Mapping[str, float]], bytes_by_stage: Mapping[StageName, int]
) -> list[str]:
    return [
        "| each graph alone | MB | largest error | relative | of what varies | gain | cosine |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_stage_row(name, row, _megabytes(bytes_by_stage, name)) for name, row in stages.items()),
    ]


def _stage_row(name: str, row: Mapping[str, float], size: str) -> str:
    figures = row["max_error"], row["relative_error"], _of_what_varies(row)
    errors = " | ".join(f"{figure:.2e}" for figure in figures)
    return f"| {name} | {size} | {errors} | {row['gain']:.6f} | {row['cosine']:.7f} |"


def _of_what_varies(row: Mapping[str, float]) -> float:
    return row["varying"] / max(row["variation"], 1e-12)


def _megabytes(sizes: Mapping[StageName, int], name: str) -> str:
    found = {**sizes}.get(name)  # type: ignore[call-overload]
    return "" if found is None else f"{found / 1e6:.1f}"


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
