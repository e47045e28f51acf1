"""The whole way from a checkpoint to a published bundle."""

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.numpy import save
from torch import nn
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
    Layout,
    Manifest,
    PolicySpec,
    Precision,
    SourceSpec,
    StageName,
    StageSpec,
)
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.signatures import cached_gpt_signature, signature
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, Feature
from vqbet_edge.training.layouts import Era
from vqbet_export.graph import export_graph
from vqbet_export.lerobot import lerobot_files
from vqbet_export.metrics import LIMITS, Verification, summarize
from vqbet_export.observations import Segment, dataset_segments, random_segments
from vqbet_export.publishing import publish
from vqbet_export.quantization import quantize_bundle, verification_segments
from vqbet_export.report import report_data, report_markdown
from vqbet_export.sensitivity import CHART_NAME, sensitivity_chart
from vqbet_export.stages import (
    CACHED_GPT_FREE_AXES,
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

LAYOUTS: dict[Era, Layout] = {Era.A: "0.1", Era.B: "0.2-0.3", Era.C: "0.4+"}
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
# Larger code books are decoded by their graph.
MAX_TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        checkpoint: a model.safetensors, its directory, or a Hub repository id.
        output: the bundle's directory.
        precision: of convolutions and matrix products; INT8 needs `calibration_data`.
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
    contents = {**draft.bundle.contents, **lerobot_files(manifest, checkpoint.license)}
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
    precision, manifest = config.precision, _manifest(checkpoint, config)
    contents: dict[str, bytes] = {RUNTIME_NAME: save(_runtime_arrays(checkpoint))}
    for name, stage in _stages(checkpoint, DTYPES[precision]).items():
        progress(f"exporting {name} in {precision}")
        graph = export_graph(stage, signature(manifest, name))
        contents[manifest.stages[name].file] = graph
    progress(f"exporting gpt for the CPU in {precision}")
    cached = CachedGptStage(checkpoint, DTYPES[precision])
    graph = export_graph(cached, cached_gpt_signature(manifest), CACHED_GPT_FREE_AXES)
    contents[manifest.cpu_stages["gpt"].file] = graph
    return Bundle.of(config.output, manifest, contents)


def _sizes(bundle: Bundle) -> dict[Target | None, dict[StageName, int]]:
    """Bytes of every graph, for reports on the portable and on the CPU's ones."""
    portable = {name: len(bundle.graph(name)) for name in STAGES}
    cpu = {name: len(bundle.cpu_graph(name)) for name in STAGES}
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


def _stages(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[StageName, nn.Module]:
    return {
        "vision_encoder": VisionEncoderStage(checkpoint, dtype),
        "gpt": GptStage(checkpoint, dtype),
        "code_heads": CodeHeadsStage(checkpoint, dtype),
        "rvq_decoder": RvqDecoderStage(checkpoint, dtype),
    }


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


def _manifest(checkpoint: Checkpoint, config: ExportConfig) -> Manifest:
    policy = checkpoint.config
    inputs = {checkpoint.renamed.get(k, k): _feature(f) for k, f in policy.input_features.items()}
    return Manifest(
        format_version=FORMAT_VERSION,
        policy=PolicySpec(
            n_obs_steps=policy.n_obs_steps,
            action_chunk_size=policy.action_chunk_size,
            vqvae_n_embed=policy.vqvae_n_embed,
            gpt_hidden_dim=policy.gpt_hidden_dim,
            gpt_output_dim=policy.gpt_output_dim,
            gpt_n_layer=policy.gpt_n_layer,
            gpt_n_head=policy.gpt_n_head,
            bet_softmax_temperature=policy.bet_softmax_temperature,
            sequentially_select=policy.sequentially_select,
        ),
        input_features=inputs,
        output_features={ACTION_KEY: _feature(policy.output_features[ACTION_KEY])},
        crop=CropSpec(**runtime_crop(policy)._asdict()),
        stages={name: StageSpec(f"{name}.onnx", config.precision) for name in STAGES},
        cpu_stages={"gpt": StageSpec("gpt_cached.onnx", config.precision)},
        files={},
        verification=None,
        calibration=None,
        source=SourceSpec(checkpoint.name, checkpoint.sha256, LAYOUTS[checkpoint.era]),
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


def _verify(
    draft: _Draft, checkpoint: Checkpoint, config: ExportConfig, progress: Callable[[str], None]
) -> list[Verification]:
    steps, batch = config.verify_steps, 1
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
