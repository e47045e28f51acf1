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

from vqbet_edge.runtime.bundle import (
    CAUSAL_MASK,
    DECODE_TABLE,
    RUNTIME_NAME,
    TOKEN_CONSTANTS,
    Bundle,
)
from vqbet_edge.runtime.manifest import TARGETS, Manifest, Precision, Target
from vqbet_edge.runtime.signatures import cached_gpt_signature, signature
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.description import CACHED_GPT_NAME, describe, scaling_arrays
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_edge.training.nyu import NyuCheckpoint
from vqbet_export.graph import export_graph
from vqbet_export.nyu_stages import nyu_cuts
from vqbet_export.stages import CACHED_GPT_FREE_AXES, Cuts, causal_mask, decode_table, lerobot_cuts

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
# Larger codebooks are decoded by their graph.
MAX_TABLE_BYTES = 64 << 20


def assemble(
    checkpoint: AnyCheckpoint,
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
    cuts = _cuts(checkpoint)
    versions = {name: version(name) for name in ("vqbet-edge", "torch", "onnx", "onnxruntime")}
    tools = {"python": platform.python_version(), **versions}
    manifest = msgspec.structs.replace(manifest, tools=tools)
    contents = {RUNTIME_NAME: save(_runtime_arrays(checkpoint, cuts))}
    for name, spec in (*manifest.stages.items(), *manifest.cpu_stages.items()):
        progress(f"exporting {spec.file} in {precision}")
        contents[spec.file] = (
            _cached_gpt(cuts, manifest, dtype)
            if spec.file == CACHED_GPT_NAME
            else export_graph(cuts.stages[name](dtype), signature(manifest, name))
        )
    return Bundle.of(path, manifest, contents)


def _cuts(checkpoint: AnyCheckpoint) -> Cuts:
    match checkpoint:
        case Checkpoint():
            return lerobot_cuts(checkpoint)
        case NyuCheckpoint():
            return nyu_cuts(checkpoint)
    raise TypeError(f"no family of checkpoints has {type(checkpoint).__name__}")


def _cached_gpt(cuts: Cuts, manifest: Manifest, dtype: torch.dtype) -> bytes:
    # Traced for one window, it would serve no more than one.
    several = cached_gpt_signature(manifest, batch=2)
    return export_graph(cuts.cached_gpt(dtype), several, CACHED_GPT_FREE_AXES)


def _runtime_arrays(checkpoint: AnyCheckpoint, cuts: Cuts) -> dict[str, NDArray[np.float32]]:
    """What the runtime needs beside the graphs: docs/bundle.md says what each array is."""
    arrays = scaling_arrays(checkpoint)
    arrays[TOKEN_CONSTANTS] = cuts.constants.numpy()
    arrays[CAUSAL_MASK] = causal_mask(cuts.constants.shape[:2].numel()).numpy()
    if is_tabulated(checkpoint):
        arrays[DECODE_TABLE] = decode_table(checkpoint.network.head.vqvae_model).numpy()
    return arrays


def is_tabulated(checkpoint: AnyCheckpoint) -> bool:
    """Whether the bundle has every code pair's chunk in a table."""
    config = checkpoint.config
    values = config.vqvae_n_embed**2 * config.action_chunk_size * checkpoint.action_dim
    return values * 4 <= MAX_TABLE_BYTES
