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
) -> dict[str, Any]:
    """The report as plain data, with the fields' own names."""
    return {
        "source": msgspec.to_builtins(manifest.source),
        "precision": precision,
        "tools": manifest.tools,
        "limits": asdict(LIMITS[precision]),
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
    for result in data["results"]:
        target = result["target"]
        graphs = "" if target is None else f", graphs for {target}"
        graph = bundle.cpu_graph if target == "cpu" else bundle.graph
        sizes = {name: len(graph(name)) for name in STAGES}
        heading = f"## On {result['samples']} {result['observations']} observations{graphs}"
        lines += ["", heading, "", *_stage_table(result["stages"], sizes)]
        lines += ["", *_policy_table(result["policy"])]
    limits = {name: limit for name, limit in data["limits"].items() if limit is not None}
    lines += ["", "## Limits", "", *(f"- {k.replace('_', ' ')}: {v:g}" for k, v in limits.items())]
    lines += quantization_markdown(data["quantization"])
    lines += ["", "## Made with", "", *(f"- {k} {v}" for k, v in data["tools"].items()), ""]
    return "\n".join(lines)


def _stage_table(
    stages: Mapping[StageName, Mapping[str, float]], bytes_by_stage: Mapping[StageName, int]
) -> list[str]:
    return [
        "| stage | MB | largest error | relative error | smallest cosine |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {bytes_by_stage[name] / 1e6:.1f} | {row['max_error']:.2e} "
            f"| {row['relative_error']:.2e} | {row['cosine']:.7f} |"
            for name, row in stages.items()
        ),
    ]


def _policy_table(policy: Mapping[str, float]) -> list[str]:
    return [
        "| whole policy, codes forced | |",
        "|---|---:|",
        f"| largest action error, in the action's units | {policy['action_error']:.3g} |",
        f"| ... relative to the action's range | {policy['relative_action_error']:.2e} |",
        f"| agreement of the most probable codes | {policy['code_agreement']:.2%} |",
        f"| largest change of a code's probability | {policy['probability_error']:.2e} |",
        f"| mean total variation of the code distribution | {policy['total_variation']:.2e} |",
    ]
