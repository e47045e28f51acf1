"""The whole way from a checkpoint to a published bundle."""

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from vqbet_engines.boards import Board, load_board
from vqbet_engines.suitability import check_graphs

from vqbet_edge.bundle import (
    CAUSAL_MASK,
    DECODE_TABLE,
    RUNTIME_NAME,
    SECONDARY_COLUMNS,
    TOKEN_CONSTANTS,
    Bundle,
)
from vqbet_edge.errors import NonFiniteError, UsageError, VerificationError
from vqbet_edge.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
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
from vqbet_edge.model.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.model.config import ACTION_KEY, STATE_KEY, Feature
from vqbet_edge.safetensors import read_safetensors
from vqbet_export.graph import export_graph
from vqbet_export.metrics import LIMITS, Verification
from vqbet_export.observations import dataset_segments, random_segments
from vqbet_export.publishing import publish
from vqbet_export.report import report_data, report_markdown
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
# Larger code books are decoded by their graph.
MAX_TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        checkpoint: a model.safetensors, its directory, or a Hub repository id.
        output: the bundle's directory.
        precision: of convolutions and matrix products.
        batch_size: robots that one bundle serves at once.
        verify_data: a LeRobot data set to verify on, besides random observations.
        verify_steps: observations of each kind to verify on.
        board: name of a board profile whose TensorRT the graphs must suit.
        force: replace an existing bundle.
    """

    checkpoint: str
    output: Path
    precision: Precision = "fp32"
    batch_size: int = 1
    verify_data: str | None = None
    verify_steps: int = 128
    board: str | None = None
    force: bool = False


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
    board = None if config.board is None else load_board(config.board)
    progress("loading the checkpoint")
    checkpoint = load_checkpoint(config.checkpoint)
    contents: dict[str, bytes] = {RUNTIME_NAME: save(_runtime_arrays(checkpoint))}
    stages: dict[StageName, StageSpec] = {}
    for name, stage in _stages(checkpoint, config).items():
        progress(f"exporting {name}")
        graph, spec = stage.export(name, config.precision)
        contents[spec.file], stages[name] = graph, spec
    progress("exporting gpt for the CPU")
    graph, cpu_gpt = _cached_gpt(checkpoint, config).export("gpt_cached", config.precision)
    contents[cpu_gpt.file] = graph
    notes: tuple[str, ...] = ()
    if board is not None:
        progress(f"building for {board.name}")
        notes = _check_board(board, {name: contents[spec.file] for name, spec in stages.items()})
    manifest = _manifest(checkpoint, config, stages, {"gpt": cpu_gpt})
    draft = _bundle(manifest, contents, config.output)
    results = _verify(draft, checkpoint, config, progress)
    progress("writing the bundle")
    # The last set is the real one, if there is one.
    verified = msgspec.structs.replace(draft.manifest, verification=results[-1].summary())
    report = report_data(verified, config.precision, LIMITS[config.precision], results)
    report["board_notes"] = list(notes)
    sizes: dict[str, int] = {name: len(contents[spec.file]) for name, spec in stages.items()}
    contents["report.json"] = msgspec.json.format(msgspec.json.encode(report), indent=2)
    contents["report.md"] = report_markdown(report, sizes).encode()
    publish(config.output, contents, msgspec.structs.replace(verified, files=_file_specs(contents)))
    return ExportResult(config.output, report)


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
        source=SourceSpec(name=checkpoint.name, sha256=checkpoint.sha256, era=checkpoint.era.value),
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
    bundle: Bundle, checkpoint: Checkpoint, config: ExportConfig, progress: Callable[[str], None]
) -> list[Verification]:
    steps, batch = config.verify_steps, config.batch_size
    try:
        progress("verifying on random observations")
        results = [verify(bundle, checkpoint, random_segments(checkpoint, steps, batch), "random")]
        if config.verify_data is not None:
            progress(f"verifying on {config.verify_data}")
            segments = dataset_segments(checkpoint, config.verify_data, steps, batch)
            results.append(verify(bundle, checkpoint, segments, "real"))
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
