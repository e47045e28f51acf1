"""What the runtime needs to know of a checkpoint: the manifest and the scalings of a bundle."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.bundle import Bundle
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
from vqbet_edge.training.config import ACTION_KEY, Feature
from vqbet_edge.training.family import AnyCheckpoint

CACHED_GPT_NAME = "gpt_cached.onnx"


def without_graphs(checkpoint: AnyCheckpoint) -> Bundle:
    """A checkpoint as `EdgePolicy` takes it, for a backend that has the network itself."""
    manifest = describe(checkpoint, "fp32")
    return Bundle(Path(checkpoint.name), manifest, {}, scaling_arrays(checkpoint))


def describe(
    checkpoint: AnyCheckpoint, precision: Precision, targets: Sequence[Target] = TARGETS
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
        crop=runtime_crop(checkpoint),
        stages=stages,
        cpu_stages=for_cpu if "cpu" in targets else {},
        fps=checkpoint.fps,
        license=checkpoint.license,
        files={},
        verification=None,
        calibration=None,
        source=SourceSpec(checkpoint.name, checkpoint.sha256, checkpoint.layout.value),
        tools={},
    )


def _feature(feature: Feature) -> FeatureSpec:
    return FeatureSpec(type=feature.type.value, shape=feature.shape)


def scaling_arrays(checkpoint: AnyCheckpoint) -> dict[str, NDArray[np.float32]]:
    """Scalings and demonstrated ranges, by the names that docs/bundle.md gives them."""
    scalings = {"state": checkpoint.state_scaling, "action": checkpoint.action}
    arrays = {
        f"{key}.{term}": getattr(scaling, term)
        for key, scaling in scalings.items()
        for term in ("subtract", "multiply", "add")
    }
    ranges = {ACTION_RANGE: checkpoint.action_range, STATE_RANGE: checkpoint.state_range}
    return arrays | {name: found for name, found in ranges.items() if found is not None}


def center_crop(size: tuple[int, ...], crop: tuple[int, int]) -> CropSpec:
    """The centre of an image of `size`, rounded as torchvision's `CenterCrop` rounds."""
    top, left = (round((full - part) / 2.0) for full, part in zip(size, crop, strict=True))
    return CropSpec(top, left, *crop)


def runtime_crop(checkpoint: AnyCheckpoint) -> CropSpec:
    """What the runtime cuts out of every frame before the encoder sees it.

    The crop costs nothing while the frame is copied; only behind a resize the graph has to do it.
    """
    full, config = checkpoint.frame_size, checkpoint.config
    return center_crop(full, config.encoder_shape if config.resize_shape is None else full)
