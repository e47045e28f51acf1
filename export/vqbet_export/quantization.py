"""INT8 graphs of a bundle, for TensorRT, for CPUs, or for both side by side."""

from collections.abc import Callable, Sequence
from dataclasses import replace

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


def quantize_bundle(
    floating: Bundle,
    half: Bundle | None,
    samples: Samples,
    targets: Sequence[Target],
    progress: Callable[[str], None],
) -> tuple[Bundle, tuple[Quantization, ...]]:
    """Quantise a policy for some targets.

    The graphs for TensorRT are float16 with INT8 inside; those of CPUs, whose kernels compute
    signed graphs slowly and float16 scales wrongly, are float32 with INT8 inside.

    Args:
        floating: a draft of the bundle in float32, with TensorRT's graphs and the targets'.
        half: one in float16 with TensorRT's graphs; only "tensorrt" needs it.
        samples: what the robot sees.
        targets: whom the bundle is for.
        progress: is told what happens next.

    Returns:
        A draft of the INT8 bundle, and how it came about.

    Raises:
        VerificationError: no layer can be quantised within the limits.
    """
    quantizations = quantize(floating, samples, targets, progress)
    specs: dict[Target, dict[StageName, StageSpec]] = {"tensorrt": {}, "cpu": {}}
    contents = {RUNTIME_NAME: floating.contents[RUNTIME_NAME]}
    for found in quantizations:
        precision: Precision = "fp32"
        graph = floating.cpu_graph
        if found.target == "tensorrt" and half is not None:
            precision, graph = "fp16", half.graph
        for stage in STAGES:
            file, data, quantized = f"{stage}.onnx", graph(stage), stage in QUANTIZED
            if found.target == "cpu":
                alone = f"{stage}.onnx" if len(targets) == 1 else f"{stage}_cpu.onnx"
                file = CACHED_GPT_NAME if stage == "gpt" else alone
            contents[file] = found.twin(stage, data) if quantized else data
            specs[found.target][stage] = StageSpec(file, "int8" if quantized else precision)
    manifest = msgspec.structs.replace(
        floating.manifest,
        stages=specs["tensorrt"],
        cpu_stages=specs["cpu"],
        calibration=CalibrationSpec(
            source=samples.source, sha256=samples.digest, observations=samples.observations
        ),
    )
    return replace(floating, manifest=manifest, contents=contents), quantizations
