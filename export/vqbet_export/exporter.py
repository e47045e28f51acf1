"""The whole way from a checkpoint to a published bundle."""

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from vqbet_calibration.quantize import Quantization
from vqbet_calibration.samples import Samples, load_samples
from vqbet_calibration.targets import TARGETS, Target
from vqbet_engines.boards import Board, load_board
from vqbet_engines.suitability import check_graphs

from vqbet_edge.errors import NonFiniteError, UsageError, VerificationError
from vqbet_edge.runtime.bundle import (
    CAUSAL_MASK,
    DECODE_TABLE,
    RUNTIME_NAME,
    SECONDARY_COLUMNS,
    TOKEN_CONSTANTS,
    Bundle,
)
from vqbet_edge.runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    STAGES,
    CropSpec,
    FeatureSpec,
    FileSpec,
    Manifest,
    PolicySpec,
    Precision,
    SourceSpec,
    StageName,
    StageSpec,
    TensorSpec,
)
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.safetensors import read_safetensors
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, Feature
from vqbet_edge.training.layouts import Layout
from vqbet_export.graph import export_graph
from vqbet_export.metrics import LIMITS, Verification, summarize
from vqbet_export.observations import Segment, dataset_segments, random_segments
from vqbet_export.publishing import publish
from vqbet_export.quantization import quantize_bundle, verification_segments
from vqbet_export.report import report_data, report_markdown
from vqbet_export.sensitivity import CHART_NAME, sensitivity_chart
from vqbet_export.stages import (
    CachedGptStage,
    CodeHeadsStage,
    GptStage,
    RvqDecoderStage,
    VisionEncoderStage,
    causal_mask,
    decode_table,
    runtime_crop,
    secondary_columns,
    token_constants,
)
from vqbet_export.verification import verify

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_ERAS: dict[Layout, Literal["A", "B", "C"]] = {
    Layout.V0_1: "A",
    Layout.V0_2: "B",
    Layout.V0_4: "C",
}
# Larger code books are decoded by their graph.
MAX_TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        checkpoint: a model.safetensors, its directory, or a Hub repository id.
        output: the bundle's directory.
        precision: of convolutions and matrix products; INT8 needs `calibration_data`.
        batch_size: robots that one bundle serves at once.
        verify_data: a LeRobot data set to verify on, besides random observations.
        verify_steps: observations of each kind to verify on; of few, one near tie between codes
            is already a share above the limit.
        board: name of a board profile whose TensorRT the graphs must suit.
        force: replace an existing bundle.
        calibration_data: a LeRobot data set or a folder of recordings, for INT8.
        calibration_steps: observations to sample from it.
        targets: whom to quantise for; the others get float16.
    """

    checkpoint: str
    output: Path
    precision: Precision = "fp32"
    batch_size: int = 1
    verify_data: str | None = None
    verify_steps: int = 512
    board: str | None = None
    force: bool = False
    calibration_data: str | None = None
    calibration_steps: int = 1024
    targets: tuple[Target, ...] = TARGETS


@dataclass(frozen=True)
class ExportResult:
    """A published bundle and its report."""

    path: Path
    report: dict[str, Any]


def export(config: ExportConfig, progress: Callable[[str], None] = lambda _: None) -> ExportResult:
    """Export a checkpoint, verify the graphs and publish the bundle.

    Args:
        config: what to do.
        progress: is told what happens next.

    Raises:
        CheckpointError, DatasetError: the input does not do.
        UsageError: the bundle exists and `force` is not set.
        VerificationError: the graphs do not compute the policy; nothing was published.
        DiskError: the bundle cannot be written.
    """
    _check_output(config)
    _check_calibration(config)
    board = None if config.board is None else load_board(config.board)
    progress("loading the checkpoint")
    checkpoint = load_checkpoint(config.checkpoint)
    draft = _draft(checkpoint, config, progress)
    notes: tuple[str, ...] = ()
    if board is not None:
        progress(f"building for {board.name}")
        notes = _check_board(board, {name: draft.bundle.graph(name) for name in STAGES})
    results = _verify(draft, checkpoint, config, progress)
    progress("writing the bundle")
    manifest = msgspec.structs.replace(draft.bundle.manifest, verification=summarize(results))
    report = report_data(manifest, config.precision, LIMITS[config.precision], results)
    report["board_notes"] = list(notes)
    report["quantization"] = [found.report() for found in draft.quantizations]
    contents = dict(draft.bundle.contents)
    if draft.quantizations:
        contents[CHART_NAME] = sensitivity_chart(report["quantization"])
    contents["report.json"] = msgspec.json.format(msgspec.json.encode(report), indent=2)
    contents["report.md"] = report_markdown(report, _sizes(draft.bundle)).encode()
    publish(config.output, contents, msgspec.structs.replace(manifest, files=_file_specs(contents)))
    return ExportResult(config.output, report)


@dataclass(frozen=True)
class _Draft:
    """A bundle to be verified; for INT8, with how it was quantised and on what."""

    bundle: Bundle
    samples: Samples | None = None
    quantizations: tuple[Quantization, ...] = ()


def _draft(checkpoint: Checkpoint, config: ExportConfig, progress: Callable[[str], None]) -> _Draft:
    if config.calibration_data is None:
        return _Draft(_floating(checkpoint, config, progress))
    floating = _floating(checkpoint, replace(config, precision="fp32"), progress)
    progress(f"reading {config.calibration_data}")
    manifest = floating.manifest
    scaling = Affine.from_arrays(floating.arrays, "state", manifest.state_dim)
    samples = load_samples(config.calibration_data, manifest, scaling, config.calibration_steps)
    half = _floating(checkpoint, replace(config, precision="fp16"), progress)
    found = quantize_bundle(floating, half, samples, config.targets, progress)
    return _Draft(found.bundle, samples, found.quantizations)


def _floating(
    checkpoint: Checkpoint, config: ExportConfig, progress: Callable[[str], None]
) -> Bundle:
    """All graphs in one floating-point precision."""
    precision = config.precision
    contents: dict[str, bytes] = {RUNTIME_NAME: save(_runtime_arrays(checkpoint))}
    stages: dict[StageName, StageSpec] = {}
    for name, stage in _stages(checkpoint, config).items():
        progress(f"exporting {name} in {precision}")
        graph, spec = stage.export(name, precision)
        contents[spec.file], stages[name] = graph, spec
    progress(f"exporting gpt for the CPU in {precision}")
    graph, cpu_gpt = _cached_gpt(checkpoint, config).export("gpt_cached", precision)
    contents[cpu_gpt.file] = graph
    manifest = _manifest(checkpoint, config, stages, {"gpt": cpu_gpt})
    return _bundle(manifest, contents, config.output)


def _sizes(bundle: Bundle) -> dict[Target | None, dict[StageName, int]]:
    """Bytes of every graph, for reports on the portable and on the CPU's ones."""
    portable = {name: len(bundle.graph(name)) for name in STAGES}
    cpu = {name: len(bundle.contents[bundle.cpu_stage(name).file]) for name in STAGES}
    return {None: portable, "tensorrt": portable, "cpu": cpu}


def _check_calibration(config: ExportConfig) -> None:
    if config.precision == "int8" and config.calibration_data is None:
        raise UsageError(
            "--int8 needs observations to calibrate on: pass --calibration-data with the data set "
            "that the policy was trained on (a folder in LeRobot's format or a Hub id), or with a "
            "folder of what the robot saw, recorded on it in FP16 or FP32 by "
            "`with policy.record(folder): ...`. Random numbers would not do: they give ranges "
            "that a camera never fills"
        )
    if config.precision != "int8" and config.calibration_data is not None:
        raise UsageError("--calibration-data is for --int8; add it, or verify with --verify-data")


def _check_output(config: ExportConfig) -> None:
    if not config.output.exists():
        return
    if not (config.output / MANIFEST_NAME).exists():
        raise UsageError(f"'{config.output}' exists and is no bundle; choose another place with -o")
    if not config.force:
        raise UsageError(f"'{config.output}' exists; replace it with --force, or choose another -o")


@dataclass(frozen=True)
class _StageExport:
    """A stage ready to be traced: example inputs and names fix the graph's borders."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    # Axes of inputs that may be shorter than in the example.
    free: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def export(self, name: str, precision: Precision) -> tuple[bytes, StageSpec]:
        graph = export_graph(self.module, self.inputs, self.outputs, self.free)
        with torch.no_grad():
            values = self.module(*self.inputs.values())
        results = values if isinstance(values, tuple) else (values,)
        spec = StageSpec(
            file=f"{name}.onnx",
            precision=precision,
            inputs=_tensor_specs(self.inputs),
            outputs=_tensor_specs(dict(zip(self.outputs, results, strict=True))),
        )
        return graph, spec


def _tensor_specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))  # type: ignore[arg-type]
        for name, t in tensors.items()
    )


def _stages(checkpoint: Checkpoint, config: ExportConfig) -> dict[StageName, _StageExport]:
    policy, dtype, batch = checkpoint.config, DTYPES[config.precision], config.batch_size
    cameras, window = len(policy.image_keys), policy.n_obs_steps
    crop, width = runtime_crop(policy), policy.gpt_hidden_dim
    frames = torch.zeros(batch, cameras, crop.height, crop.width, 3, dtype=torch.uint8)
    image_tokens = torch.zeros(batch, window, cameras, width)
    states = torch.zeros(batch, window, policy.state_dim)
    feature = torch.zeros(batch, policy.gpt_output_dim)
    codes = torch.zeros(batch, 2, dtype=torch.int64)
    return {
        "vision_encoder": _StageExport(
            VisionEncoderStage(checkpoint, dtype), {"frames": frames}, ["frame_tokens"]
        ),
        "gpt": _StageExport(
            GptStage(checkpoint, dtype),
            {"image_tokens": image_tokens, "states": states},
            ["feature"],
        ),
        "code_heads": _StageExport(
            CodeHeadsStage(checkpoint, dtype), {"feature": feature}, ["logits", "offsets"]
        ),
        "rvq_decoder": _StageExport(
            RvqDecoderStage(checkpoint, dtype), {"codes": codes}, ["decoded"]
        ),
    }


def _cached_gpt(checkpoint: Checkpoint, config: ExportConfig) -> _StageExport:
    policy, batch = checkpoint.config, config.batch_size
    cameras, window, width = len(policy.image_keys), policy.n_obs_steps, policy.gpt_hidden_dim
    tokens, heads = window * policy.tokens_per_step, policy.gpt_n_head
    inputs = {
        "image_tokens": torch.zeros(batch, window, cameras, width),
        "states": torch.zeros(batch, window, policy.state_dim),
        "constants": torch.zeros(window, policy.tokens_per_step, width),
        "mask": torch.zeros(tokens, 2 * tokens),
        "past": torch.zeros(2 * policy.gpt_n_layer, batch, heads, tokens, width // heads),
    }
    free = {"image_tokens": (1,), "states": (1,), "constants": (0,), "mask": (0, 1), "past": (3,)}
    module = CachedGptStage(checkpoint, DTYPES[config.precision])
    return _StageExport(module, inputs, ["feature", "present"], free)


def _runtime_arrays(checkpoint: Checkpoint) -> dict[str, Any]:
    scalings = {"state": checkpoint.inputs[STATE_KEY], "action": checkpoint.action}
    arrays = {
        f"{key}.{term}": getattr(scaling, term)
        for key, scaling in scalings.items()
        for term in ("subtract", "multiply", "add")
    }
    config = checkpoint.config
    tokens = config.n_obs_steps * config.tokens_per_step
    arrays[TOKEN_CONSTANTS] = token_constants(checkpoint).numpy()
    arrays[CAUSAL_MASK] = causal_mask(tokens).numpy()
    values = config.vqvae_n_embed**2 * config.action_chunk_size * config.action_dim
    if values * 4 <= MAX_TABLE_BYTES:
        arrays[DECODE_TABLE] = decode_table(checkpoint).numpy()
    if config.sequentially_select:
        arrays[SECONDARY_COLUMNS] = secondary_columns(checkpoint).numpy()
    return arrays


def _manifest(
    checkpoint: Checkpoint,
    config: ExportConfig,
    stages: dict[StageName, StageSpec],
    cpu_stages: dict[StageName, StageSpec],
) -> Manifest:
    policy = checkpoint.config
    inputs = {checkpoint.renamed.get(k, k): _feature(f) for k, f in policy.input_features.items()}
    return Manifest(
        format_version=FORMAT_VERSION,
        batch_size=config.batch_size,
        policy=PolicySpec(
            n_obs_steps=policy.n_obs_steps,
            action_chunk_size=policy.action_chunk_size,
            vqvae_n_embed=policy.vqvae_n_embed,
            bet_softmax_temperature=policy.bet_softmax_temperature,
            sequentially_select=policy.sequentially_select,
        ),
        input_features=inputs,
        output_features={ACTION_KEY: _feature(policy.output_features[ACTION_KEY])},
        crop=CropSpec(**runtime_crop(policy)._asdict()),
        stages=stages,
        cpu_stages=cpu_stages,
        files={},
        verification=None,
        calibration=None,
        source=SourceSpec(
            name=checkpoint.name, sha256=checkpoint.sha256, era=_ERAS[checkpoint.layout]
        ),
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("vqbet-edge", "torch", "onnx", "onnxruntime")},
        },
    )


def _feature(feature: Feature) -> FeatureSpec:
    return FeatureSpec(type=feature.type.value, shape=feature.shape)


def _file_specs(contents: Mapping[str, bytes]) -> dict[str, FileSpec]:
    return {
        name: FileSpec(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for name, data in sorted(contents.items())
    }


def _check_board(board: Board, graphs: Mapping[StageName, bytes]) -> tuple[str, ...]:
    """How far the check went.

    Raises:
        VerificationError: the board's TensorRT will not take the graphs.
    """
    suitability = check_graphs(graphs, board)
    if suitability.problems:
        raise VerificationError(
            f"the graphs do not suit {board.name}, nothing was published: "
            + "; ".join(suitability.problems)
        )
    return suitability.notes


def _bundle(manifest: Manifest, contents: dict[str, bytes], path: Path) -> Bundle:
    arrays = read_safetensors(contents[RUNTIME_NAME], RUNTIME_NAME)
    return Bundle(path=path, manifest=manifest, contents=contents, arrays=arrays)


def _verify(
    draft: _Draft, checkpoint: Checkpoint, config: ExportConfig, progress: Callable[[str], None]
) -> list[Verification]:
    steps, batch = config.verify_steps, config.batch_size
    sets: dict[str, list[Segment]] = {}
    if draft.samples is None:
        sets["random"] = random_segments(checkpoint, steps, batch)
    else:  # noise is outside the calibrated ranges
        sets["held-out"] = verification_segments(draft.samples, batch)
    if config.verify_data is not None:
        sets["real"] = dataset_segments(checkpoint, config.verify_data, steps, batch)
    targets = (None,) if draft.samples is None else TARGETS
    results = []
    try:
        for name, segments in sets.items():
            progress(f"verifying on {name} observations")
            results += [verify(draft.bundle, checkpoint, segments, name, t) for t in targets]
    except NonFiniteError as error:
        raise VerificationError(
            f"the {config.precision} graphs overflow, nothing was published: {error}"
        ) from error
    violations = [
        line for result in results for line in result.violations(LIMITS[config.precision])
    ]
    if violations:
        raise VerificationError(
            f"the {config.precision} graphs differ from the checkpoint, nothing was published: "
            + "; ".join(violations)
        )
    return results
