"""INT8 graphs of a bundle, for TensorRT, for CPUs, or for both side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
from vqbet_calibration.quantize import STAGES as QUANTIZED
from vqbet_calibration.quantize import Quantization, quantize
from vqbet_calibration.samples import Samples

from vqbet_edge.runtime.bundle import RUNTIME_NAME, Bundle
from vqbet_edge.runtime.manifest import (
    STAGES,
    CalibrationSpec,
    Precision,
    StageName,
    StageSpec,
    Target,
)
from vqbet_edge.training.description import CACHED_GPT_NAME


@dataclass(frozen=True)
class Int8:
    """A draft of an INT8 bundle, and how it came about."""

    bundle: Bundle
    quantizations: tuple[Quantization, ...]


class _Graph(NamedTuple):
    data: bytes
    precision: Precision


def quantize_bundle(
    floating: Bundle,
    half: Bundle | None,
    samples: Samples,
    targets: Sequence[Target],
    progress: Callable[[str], None],
) -> Int8:
    """Quantise a policy for some targets.

    The graphs for TensorRT are float16 with INT8 inside; those of CPUs, whose kernels compute
    signed graphs slowly and float16 scales wrongly, are float32 with INT8 inside.

    Args:
        floating: a draft of the bundle in float32, with TensorRT's graphs and the targets'.
        half: one in float16 with TensorRT's graphs; only "tensorrt" needs it.
        samples: what the robot sees.
        targets: whom the bundle is for.
        progress: is told what happens next.

    Raises:
        VerificationError: no layer can be quantised within the limits.
    """
    quantizations = quantize(floating, samples, targets, progress)
    specs: dict[Target, dict[StageName, StageSpec]] = {"tensorrt": {}, "cpu": {}}
    contents = {RUNTIME_NAME: floating.contents[RUNTIME_NAME]}
    for found in quantizations:
        for stage, graph in _graphs(found, floating, half).items():
            file = _file(stage, found.target, targets)
            specs[found.target][stage] = StageSpec(file, graph.precision)
            contents[file] = graph.data
    manifest = msgspec.structs.replace(
        floating.manifest,
        stages=specs["tensorrt"],
        cpu_stages=specs["cpu"],
        calibration=CalibrationSpec(
            source=samples.source, sha256=samples.digest, observations=samples.observations
        ),
    )
    return Int8(replace(floating, manifest=manifest, contents=contents), quantizations)


def _graphs(found: Quantization, floating: Bundle, half: Bundle | None) -> dict[StageName, _Graph]:
    """All four of one target."""
    precision: Precision
    if found.target == "tensorrt" and half is not None:
        precision, of = "fp16", half.graph
    else:
        precision, of = "fp32", floating.cpu_graph
    graphs = {stage: _Graph(of(stage), precision) for stage in STAGES}
    return graphs | {s: _Graph(found.twin(s, of(s)), "int8") for s in QUANTIZED}


def _file(stage: StageName, target: Target, targets: Sequence[Target]) -> str:
    if target == "tensorrt":
        return f"{stage}.onnx"
    if stage == "gpt":
        return CACHED_GPT_NAME
    return f"{stage}.onnx" if len(targets) == 1 else f"{stage}_cpu.onnx"
