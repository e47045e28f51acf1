"""Proof that a bundle computes the policy that it was exported from.

Every stage runs by itself on the reference's inputs; the whole bundle runs through `EdgePolicy`
with the reference's codes forced, so that normalisation, window, table and fusion are proven too.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vqbet_calibration.targets import Target

from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.bundle import SECONDARY_COLUMNS, Bundle
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.policy import EdgePolicy
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_export.metrics import PolicyResult, StageResult, Verification
from vqbet_export.observations import Segment
from vqbet_export.portable import PortableBackend, StageSession
from vqbet_export.reference import ReferenceRun, run_reference
from vqbet_export.stages import decode_table

Array = NDArray[Any]

# All pairs of a code book of 64; of larger ones, as many pairs spread evenly.
MAX_DECODED_PAIRS = 4096


def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    segments: list[Segment],
    name: str,
    target: Target | None = None,
) -> Verification:
    """Compare a bundle with its checkpoint.

    Args:
        bundle: need not have a verification summary yet.
        checkpoint: what it was exported from.
        segments: the observations to compare on.
        name: what to call them in the report.
        target: whose graphs to run, stage by stage and end to end; None takes the portable ones
            for the first and the CPU's for the second.
    """
    runs = [run_reference(checkpoint, segment) for segment in segments]
    return Verification(
        observations=name,
        samples=sum(run.codes.shape[0] * run.codes.shape[1] for run in runs),
        stages=_verify_stages(bundle, checkpoint, segments, runs, target),
        policy=_verify_policy(bundle, checkpoint, segments, runs, target),
        target=target,
    )


def _verify_stages(
    bundle: Bundle,
    checkpoint: Checkpoint,
    segments: list[Segment],
    runs: list[ReferenceRun],
    target: Target | None,
) -> dict[StageName, StageResult]:
    encoder, gpt = (StageSession(bundle, name, target) for name in ("vision_encoder", "gpt"))
    tokens, features = [], []
    for segment, run in zip(segments, runs, strict=True):
        tokens += [encoder.run(bundle.manifest.crop.cut(frames))[0] for frames in segment.frames]
        windows = zip(run.image_tokens, run.states, strict=True)
        features += [gpt.run(images, states)[0] for images, states in windows]
    return {
        "vision_encoder": _compare(tokens, [run.frame_tokens for run in runs]),
        "gpt": _compare(features, [run.features for run in runs]),
        "code_heads": _verify_heads(bundle, runs, target),
        "rvq_decoder": _verify_decoder(bundle, checkpoint),
    }


def _compare(outputs: list[Array], references: list[Array]) -> StageResult:
    """Outputs (B, ...) per step against references (M, B, ...) per segment, row by row."""
    return StageResult.compare(
        np.concatenate(outputs), np.concatenate([r.reshape(-1, *r.shape[2:]) for r in references])
    )


def _verify_heads(bundle: Bundle, runs: list[ReferenceRun], target: Target | None) -> StageResult:
    heads = StageSession(bundle, "code_heads", target)
    logits, offsets = [], []
    for run in runs:
        for feature, codes in zip(run.features, run.codes, strict=True):
            step_logits, step_offsets = heads.run(feature)
            if bundle.manifest.policy.sequentially_select:
                step_logits[:, 1] += bundle.arrays[SECONDARY_COLUMNS][codes[:, 0]]
            logits.append(step_logits)
            offsets.append(step_offsets)
    return StageResult.worst(
        [
            _compare(logits, [run.logits for run in runs]),
            _compare(offsets, [run.offsets for run in runs]),
        ]
    )


def _verify_decoder(bundle: Bundle, checkpoint: Checkpoint) -> StageResult:
    decoder, batch = StageSession(bundle, "rvq_decoder"), 1
    size = checkpoint.config.vqvae_n_embed
    pairs = np.linspace(0, size**2 - 1, min(size**2, MAX_DECODED_PAIRS)).astype(np.int64)
    codes = np.stack(np.divmod(np.resize(pairs, -(-len(pairs) // batch) * batch), size), axis=1)
    outputs = [decoder.run(part)[0] for part in codes.reshape(-1, batch, 2)]
    table = decode_table(checkpoint).numpy()
    return StageResult.compare(np.concatenate(outputs), table[codes[:, 0], codes[:, 1]])


def _verify_policy(
    bundle: Bundle,
    checkpoint: Checkpoint,
    segments: list[Segment],
    runs: list[ReferenceRun],
    target: Target | None,
) -> PolicyResult:
    portable = target == "tensorrt"
    backend = PortableBackend(bundle) if portable else create_backend("onnxruntime", bundle)
    # Forced codes may leave the limits, and the reference has none.
    policy = EdgePolicy(bundle, backend, guards=Guards(action_limits=None))
    chunks, probabilities = [], []
    for segment, run in zip(segments, runs, strict=True):
        policy.reset()
        for frames, states, codes in zip(segment.frames, segment.states, run.codes, strict=True):
            policy.act_chunk(_observation(checkpoint, frames, states), codes=codes[0])
            decision = policy.last
            assert decision is not None  # noqa: S101 - a chunk was just predicted
            chunks.append(decision.decoded_chunk + decision.offset_chunk)
            probabilities.append(decision.code_probabilities)
    expected = np.concatenate([run.chunks.reshape(-1, *run.chunks.shape[2:]) for run in runs])
    errors = np.abs(np.reshape(chunks, expected.shape) - expected)
    logits = np.concatenate([run.logits.reshape(-1, *run.logits.shape[2:]) for run in runs])
    wanted = _softmax(logits / checkpoint.config.bet_softmax_temperature)
    got = np.reshape(probabilities, wanted.shape)
    agreement = (got.argmax(axis=-1) == wanted.argmax(axis=-1)).all(axis=1)
    return PolicyResult(
        action_error=float((errors * np.abs(checkpoint.action.multiply)).max()),
        # Normalised actions span [-1, 1].
        relative_action_error=float(errors.max()) / 2,
        code_agreement=float(agreement.mean()),
        probability_error=float(np.abs(got - wanted).max()),
        total_variation=float(np.abs(got - wanted).sum(axis=-1).mean()) / 2,
    )


def _observation(
    checkpoint: Checkpoint, frames: NDArray[np.uint8], states: NDArray[np.float32]
) -> dict[str, Array]:
    """What a robot would pass: (B, H, W, 3) per camera and (B, S)."""
    keys = checkpoint.config.image_keys
    values: dict[str, Array] = {key: frames[:, k] for k, key in enumerate(keys)}
    values[STATE_KEY] = states
    return {checkpoint.renamed.get(key, key): value for key, value in values.items()}


def _softmax(x: Array) -> Array:
    weights = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    normalized: Array = weights / weights.sum(axis=-1, keepdims=True)
    return normalized
