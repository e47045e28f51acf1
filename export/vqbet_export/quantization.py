"""INT8 stages of a bundle: graphs for TensorRT and for CPUs, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
from vqbet_calibration.quantize import STAGES, Quantization, quantize
from vqbet_calibration.samples import Samples
from vqbet_calibration.targets import Target

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import CalibrationSpec, Precision, StageName, StageSpec


@dataclass(frozen=True)
class Int8:
    """A draft of an INT8 bundle, and how it came about."""

    bundle: Bundle
    quantizations: tuple[Quantization, ...]


def quantize_bundle(
    floating: Bundle,
    half: Bundle,
    samples: Samples,
    targets: Sequence[Target],
    progress: Callable[[str], None],
) -> Int8:
    """Quantise a policy for some targets.

    The graphs for TensorRT are float16 with INT8 inside; those of CPUs
    are float32 with INT8 inside. A target that is not asked for gets float16.

    Args:
        floating: a draft of the bundle in float32.
        half: one in float16.
        samples: what the robot sees.
        targets: whom to quantise for.
        progress: is told what happens next.

    Raises:
        VerificationError: no layer can be quantised within the limits.
    """
    quantizations = quantize(floating, samples, targets, progress)
    found = {quantization.target: quantization for quantization in quantizations}
    draft = _Draft(half)
    for stage in STAGES:
        if "tensorrt" in found:
            # CPU kernels compute signed graphs slowly, and float16 scales wrongly.
            if stage not in draft.cpu_stages:
                draft.set_cpu(stage, half.graph(stage), "fp16")
            graph = found["tensorrt"].twin(stage, half.graph(stage))
            draft.set_tensorrt(stage, graph)
        if "cpu" in found:
            draft.set_cpu(stage, found["cpu"].twin(stage, floating.cpu_graph(stage)), "int8")
    if "cpu" in found:
        draft.set_cpu("code_heads", floating.graph("code_heads"), "fp32")
    calibration = CalibrationSpec(
        source=samples.source, sha256=samples.digest, observations=samples.observations
    )
    return Int8(draft.bundle(calibration), quantizations)


class _Draft:
    """A bundle whose graphs are exchanged one by one."""

    def __init__(self, base: Bundle) -> None:
        self._base, self._contents = base, dict(base.contents)
        self._stages = dict(base.manifest.stages)
        self.cpu_stages = dict(base.manifest.cpu_stages)

    def set_tensorrt(self, stage: StageName, graph: bytes) -> None:
        spec = self._stages[stage] = _with(self._stages[stage], "int8")
        self._contents[spec.file] = graph

    def set_cpu(self, stage: StageName, graph: bytes, precision: Precision) -> None:
        spec = self.cpu_stages.get(stage)
        if spec is None:
            spec = msgspec.structs.replace(self._stages[stage], file=f"{stage}_cpu.onnx")
        self.cpu_stages[stage] = _with(spec, precision)
        self._contents[spec.file] = graph

    def bundle(self, calibration: CalibrationSpec) -> Bundle:
        manifest = msgspec.structs.replace(
            self._base.manifest,
            stages=self._stages,
            cpu_stages=self.cpu_stages,
            calibration=calibration,
        )
        return replace(self._base, manifest=manifest, contents=self._contents)


def _with(spec: StageSpec, precision: Precision) -> StageSpec:
    return msgspec.structs.replace(spec, precision=precision)
