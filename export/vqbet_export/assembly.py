"""A checkpoint's graphs, arrays and manifest, put together as a bundle in memory."""

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
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
from vqbet_edge.runtime.manifest import TARGETS, Manifest, Precision, StageName, Target
from vqbet_edge.runtime.signatures import cached_gpt_signature, signature
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import VQBeTConfig
from vqbet_edge.training.description import CACHED_GPT_NAME, describe, scaling_arrays
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
    token_constants,
)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
# Larger codebooks are decoded by their graph.
MAX_TABLE_BYTES = 64 << 20
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
    versions = {name: version(name) for name in ("vqbet-edge", "torch", "onnx", "onnxruntime")}
    tools = {"python": platform.python_version(), **versions}
    manifest = msgspec.structs.replace(manifest, tools=tools)
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
    config, arrays = checkpoint.config, scaling_arrays(checkpoint)
    arrays[TOKEN_CONSTANTS] = token_constants(checkpoint).numpy()
    arrays[CAUSAL_MASK] = causal_mask(config.n_obs_steps * config.tokens_per_step).numpy()
    if is_tabulated(config):
        arrays[DECODE_TABLE] = decode_table(checkpoint).numpy()
    return arrays


def is_tabulated(config: VQBeTConfig) -> bool:
    """Whether the bundle has every code pair's chunk in a table."""
    values = config.vqvae_n_embed**2 * config.action_chunk_size * config.action_dim
    return values * 4 <= MAX_TABLE_BYTES
