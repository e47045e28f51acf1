"""A checkpoint's graphs, arrays and manifest, put together as a bundle in memory."""

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import nn

from vqbet_edge.runtime.bundle import (
    CAUSAL_MASK,
    DECODE_TABLE,
    RUNTIME_NAME,
    TOKEN_CONSTANTS,
    Bundle,
)
from vqbet_edge.runtime.manifest import (
    ACTION_RANGE,
    FORMAT_VERSION,
    STAGES,
    STATE_RANGE,
    TARGETS,
    CropSpec,
    FeatureSpec,
    Manifest,
    PolicySpec,
    Precision,
    SourceSpec,
    StageName,
    StageSpec,
    Target,
)
from vqbet_edge.runtime.signatures import cached_gpt_signature, signature
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, Feature, VQBeTConfig
from vqbet_export.graph import export_graph
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
    token_constants,
)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
# Larger codebooks are decoded by their graph.
MAX_TABLE_BYTES = 64 << 20
CACHED_GPT_NAME = "gpt_cached.onnx"
MODULES: dict[StageName, type[nn.Module]] = {
    "vision_encoder": VisionEncoderStage,
    "gpt": GptStage,
    "code_heads": CodeHeadsStage,
    "rvq_decoder": RvqDecoderStage,
}


def assemble(
    checkpoint: Checkpoint,
    path: Path,
    precision: Precision,
    progress: Callable[[str], None] = lambda _: None,
    targets: Sequence[Target] = TARGETS,
) -> Bundle:
    """Export every graph in one floating-point precision.

    Args:
        checkpoint: the policy.
        path: where the bundle will be; nothing is written.
        precision: "fp32" or "fp16".
        progress: is told what happens next.
        targets: whom it is for.
    """
    manifest, dtype = describe(checkpoint, precision, targets), DTYPES[precision]
    contents = {RUNTIME_NAME: save(runtime_arrays(checkpoint))}
    for name, spec in (*manifest.stages.items(), *manifest.cpu_stages.items()):
        progress(f"exporting {spec.file} in {precision}")
        contents[spec.file] = (
            _cached_gpt(checkpoint, manifest, dtype)
            if spec.file == CACHED_GPT_NAME
            else export_graph(MODULES[name](checkpoint, dtype), signature(manifest, name))
        )
    return Bundle.of(path, manifest, contents)


def _cached_gpt(checkpoint: Checkpoint, manifest: Manifest, dtype: torch.dtype) -> bytes:
    # Traced for one window, it would serve no more than one.
    several = cached_gpt_signature(manifest, batch=2)
    return export_graph(CachedGptStage(checkpoint, dtype), several, CACHED_GPT_FREE_AXES)


def runtime_arrays(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """What the runtime needs beside the graphs: docs/bundle.md says what each array is."""
    config = checkpoint.config
    scalings = {"state": checkpoint.inputs[STATE_KEY], "action": checkpoint.action}
    arrays = {
        f"{key}.{term}": getattr(scaling, term)
        for key, scaling in scalings.items()
        for term in ("subtract", "multiply", "add")
    }
    ranges = {ACTION_RANGE: checkpoint.action_range, STATE_RANGE: checkpoint.state_range}
    arrays |= {name: found for name, found in ranges.items() if found is not None}
    arrays[TOKEN_CONSTANTS] = token_constants(checkpoint).numpy()
    arrays[CAUSAL_MASK] = causal_mask(config.n_obs_steps * config.tokens_per_step).numpy()
    if is_tabulated(config):
        arrays[DECODE_TABLE] = decode_table(checkpoint).numpy()
    return arrays


def is_tabulated(config: VQBeTConfig) -> bool:
    """Whether the bundle has every code pair's chunk in a table."""
    values = config.vqvae_n_embed**2 * config.action_chunk_size * config.action_dim
    return values * 4 <= MAX_TABLE_BYTES


def describe(
    checkpoint: Checkpoint, precision: Precision, targets: Sequence[Target] = TARGETS
) -> Manifest:
    """The manifest of a bundle that has neither files nor been verified."""
    graphs: dict[StageName, StageSpec] = {
        name: StageSpec(f"{name}.onnx", precision) for name in STAGES
    }
    cached: dict[StageName, StageSpec] = {"gpt": StageSpec(CACHED_GPT_NAME, precision)}
    stages = graphs if "tensorrt" in targets else {}
    # CPUs share all graphs but the transformer's.
    for_cpu = cached if stages else graphs | cached
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
            tokens_per_step=policy.tokens_per_step,
            bet_softmax_temperature=policy.bet_softmax_temperature,
            sequentially_select=policy.sequentially_select,
            relative_actions=policy.relative_actions,
            action_kinds=checkpoint.action_kinds,
        ),
        input_features=inputs,
        output_features={ACTION_KEY: _feature(policy.output_features[ACTION_KEY])},
        crop=CropSpec(**runtime_crop(policy)._asdict()),
        stages=stages,
        cpu_stages=for_cpu if "cpu" in targets else {},
        fps=checkpoint.fps,
        license=checkpoint.license,
        files={},
        verification=None,
        calibration=None,
        source=SourceSpec(checkpoint.name, checkpoint.sha256, checkpoint.layout.value),
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("vqbet-edge", "torch", "onnx", "onnxruntime")},
        },
    )


def _feature(feature: Feature) -> FeatureSpec:
    return FeatureSpec(type=feature.type.value, shape=feature.shape)
