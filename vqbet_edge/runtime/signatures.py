"""The I/O signature of every graph: what goes in and what comes out.

It follows from the policy's sizes, so no bundle stores it. Letters in shapes: N window, K cameras,
H and W height and width of a frame as the runtime crops it, S width of the state or goal, P tokens
of a step, D `gpt_hidden_dim`, F `gpt_output_dim`, C codes per layer, R `secondary_rows`, W actions
per chunk, A action width, L transformer blocks. The leading 1 is the batch axis.
"""

import math
from typing import Literal, NamedTuple

from vqbet_edge.errors import BundleError
from vqbet_edge.runtime.manifest import MANIFEST_NAME, STAGES, Manifest, StageName

MAX_TENSOR_VALUES = 1 << 30


class TensorSpec(NamedTuple):
    """Name, element type and shape of a graph's input or output."""

    name: str
    dtype: Literal["uint8", "int64", "float32"]
    shape: tuple[int, ...]


class Signature(NamedTuple):
    """Inputs and outputs of a graph, in its order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Inputs, then outputs."""
        return (*self.inputs, *self.outputs)


def signature(manifest: Manifest, stage: StageName) -> Signature:
    """Inputs and outputs of a stage's graph.

    vision_encoder  frames uint8 (1, K, H, W, 3) -> frame_tokens (1, K, D)
    gpt             image_tokens (1, N, K, D), states (1, N, S) -> feature (1, F); a policy that
                    observes cameras alone has no states
    code_heads      feature (1, F) -> logits (1, 1 + R, C), offsets (1, 2, C, W, A)
    rvq_decoder     codes int64 (1, 2) -> decoded (1, W, A)
    """
    policy, crop, cameras = manifest.policy, manifest.crop, len(manifest.image_keys)
    window, width, codes = policy.n_obs_steps, policy.gpt_hidden_dim, policy.vqvae_n_embed
    chunk = policy.action_chunk_size, manifest.action_dim
    feature = _floats("feature", policy.gpt_output_dim)
    match stage:
        case "vision_encoder":
            frames = TensorSpec("frames", "uint8", (1, cameras, crop.height, crop.width, 3))
            return Signature((frames,), (_floats("frame_tokens", cameras, width),))
        case "gpt":
            tokens = _floats("image_tokens", window, cameras, width)
            states = (_floats("states", window, manifest.state_dim),) * bool(manifest.state_dim)
            return Signature((tokens, *states), (feature,))
        case "code_heads":
            logits = _floats("logits", 1 + manifest.secondary_rows, codes)
            return Signature((feature,), (logits, _floats("offsets", 2, codes, *chunk)))
        case "rvq_decoder":
            pair = TensorSpec("codes", "int64", (1, 2))
            return Signature((pair,), (_floats("decoded", *chunk),))


def cached_gpt_signature(manifest: Manifest, batch: int = 1) -> Signature:
    """Inputs and outputs of the CPU's gpt; every axis of steps or tokens at its longest.

    constants (N, P, D), mask (T, 2 T), past (2 L, B, heads, T, D / heads) -> present, as past, with
    T = N P, besides what `signature` gives for the stage, with B in the leading 1's
    place.

    Args:
        manifest: of the bundle.
        batch: B, windows in one run.
    """
    policy, plain = manifest.policy, signature(manifest, "gpt")
    window, width, heads = policy.n_obs_steps, policy.gpt_hidden_dim, policy.gpt_n_head
    per_step = policy.tokens_per_step
    tokens = window * per_step
    known = (2 * policy.gpt_n_layer, batch, heads, tokens, width // heads)
    batched = [t._replace(shape=(batch, *t.shape[1:])) for t in (*plain.inputs, *plain.outputs)]
    return Signature(
        (
            *batched[:-1],
            TensorSpec("constants", "float32", (window, per_step, width)),
            TensorSpec("mask", "float32", (tokens, 2 * tokens)),
            TensorSpec("past", "float32", known),
        ),
        (batched[-1], TensorSpec("present", "float32", known)),
    )


def check_sizes(manifest: Manifest) -> None:
    """Refuse sizes whose buffers no robot could hold.

    Raises:
        BundleError: a tensor is too large.
    """
    signatures = [*(signature(manifest, stage) for stage in STAGES), cached_gpt_signature(manifest)]
    tensors = [tensor for each in signatures for tensor in each.tensors]
    shapes = [*(tensor.shape for tensor in tensors), *manifest.image_shapes.values()]
    largest = max(map(math.prod, shapes)) * manifest.policy.n_obs_steps
    if largest > MAX_TENSOR_VALUES:
        raise BundleError(
            f"{MANIFEST_NAME}: a window of {largest} values is more than any robot's; export again"
        )


def _floats(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "float32", (1, *shape))
