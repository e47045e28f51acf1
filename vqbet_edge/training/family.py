"""What every family of checkpoints has, so that whatever follows need not know which one it is.

A family reads its own files, has its own network for reference, from top to bottom in one file, and
cuts it into the four stages of `vqbet_edge.runtime.signatures`. There are two: LeRobot's
(`checkpoint`, `network`), which `vqbet-train` writes too, and that of Robot Utility Models and
Contact-Anchored Policies (`nyu`, `nyu_network`).

Letters in shapes: B batch, N window, K cameras, S width of the vector, T tokens of a step, E width
of an encoded frame, D `gpt_hidden_dim`, F `gpt_output_dim`, C codes per layer, W actions per chunk,
A action width.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from vqbet_edge.runtime.cameras import ImageShape
from vqbet_edge.runtime.manifest import ActionKind
from vqbet_edge.runtime.normalization import ActionScaling, Affine
from vqbet_edge.training.config import (
    ACTION_KEY,
    STATE_KEY,
    Feature,
    FeatureType,
    NormalizationMode,
)
from vqbet_edge.training.layouts import Layout, Normalization
from vqbet_edge.training.network import GptSizes, PairDecoder
from vqbet_edge.training.normalization import (
    RANGE,
    Floats,
    affines,
    required_statistics,
    still_warning,
)


class Sizes(GptSizes, Protocol):
    """A policy's configuration, under LeRobot's names; `VQBeTConfig` says what they mean."""

    # ruff: noqa: D102
    @property
    def input_features(self) -> dict[str, Feature]: ...
    @property
    def output_features(self) -> dict[str, Feature]: ...
    @property
    def n_obs_steps(self) -> int: ...
    @property
    def action_chunk_size(self) -> int: ...
    @property
    def vqvae_n_embed(self) -> int: ...
    @property
    def tokens_per_step(self) -> int: ...
    @property
    def bet_softmax_temperature(self) -> float: ...
    @property
    def sequentially_select(self) -> bool: ...
    @property
    def relative_actions(self) -> tuple[bool, ...]: ...
    @property
    def resize_shape(self) -> tuple[int, int] | None: ...
    @property
    def encoder_shape(self) -> tuple[int, int]: ...


class Head(Protocol):
    """What makes codes and offsets of features."""

    sequential: bool
    num_codes: int

    @property
    def vqvae_model(self) -> PairDecoder: ...
    def code_logits(self, features: Tensor, primary: Tensor | None = None) -> Tensor:
        """(..., F), int64 (...) -> (..., 2, C), the secondary ones given the primary codes."""

    def offsets(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., 2, C, W, A)."""


class Network(Protocol):
    """The network for reference."""

    @property
    def head(self) -> Head: ...
    def crop(self, frames: Tensor) -> Tensor:
        """(..., H, W) -> what the encoder looks at of them, unless it resizes first."""

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, N, K, 3, H, W), cropped and normalised -> (B, N, K, E)."""

    def embed(self, image_tokens: Tensor) -> Tensor:
        """(..., E) -> (..., D): what a frame is to the transformer's blocks."""

    def places(self) -> Tensor:
        """(N, T, D): what every token has from its place alone."""

    def features(self, image_tokens: Tensor, states: Tensor) -> Tensor:
        """(B, N, K, E) and (B, N, S), normalised -> (B, N or more, F), step N - 1 the current."""


@dataclass(frozen=True)
class AnyCheckpoint:
    """A policy of any family, ready to be exported."""

    network: Network  # float32, in eval mode, on the CPU
    # By the policy's key, as its files have it; absent means unchanged.
    normalization: Mapping[str, Normalization]
    renamed: Mapping[str, str]  # the policy's key -> the robot's, where they differ
    layout: Layout
    name: str  # where it was loaded from, as the user wrote it
    sha256: str  # of the file that has the weights
    license: str | None = None
    # Observations a second and name or folder of the demonstrations, where its files tell.
    fps: float | None = None
    dataset: str | None = None
    action_kinds: tuple[ActionKind, ...] = ()  # of each number of an action, where somebody said
    notes: tuple[str, ...] = ()  # what its files say that a user should know

    @property
    def config(self) -> Sizes:
        """The network's configuration."""
        raise NotImplementedError

    @cached_property
    def inputs(self) -> Mapping[str, Affine]:
        """By the policy's key: robot units -> network units, images from [0, 1]."""
        return {key: self._scaling(key)[0] for key in self.config.input_features}

    @cached_property
    def action(self) -> Affine:
        """Network units -> robot units; see `action_scaling`."""
        return self._scaling(ACTION_KEY)[1]

    def _scaling(self, key: str) -> tuple[Affine, Affine]:
        features = {**self.config.input_features, **self.config.output_features}
        # (dim,) for vectors; for images (3, height, width) it is the channels that are scaled.
        dim = features[key].shape[0]
        how = self.normalization.get(key, Normalization(NormalizationMode.IDENTITY))
        stats = required_statistics(key, how.mode, how.stats, dim)
        if key == STATE_KEY and stats and (text := still_warning(key, how.mode, stats)):
            warnings.warn(text, stacklevel=4)
        return affines(how.mode, stats, how.epsilon, dim)

    @property
    def vector_key(self) -> str:
        """The policy's key of the one vector that it observes: a state, or a goal."""
        vectors = self._keys(FeatureType.STATE, FeatureType.ENV)
        return vectors[0] if vectors else STATE_KEY

    @property
    def state_dim(self) -> int:
        """Width of that vector; 0 where the policy observes cameras alone."""
        feature = self.config.input_features.get(self.vector_key)
        return 0 if feature is None else feature.shape[0]

    @property
    def state_scaling(self) -> Affine:
        """Of that vector, robot units -> network units."""
        return self.inputs.get(self.vector_key, Affine.identity(0))

    @property
    def action_dim(self) -> int:
        """Width of one action."""
        return self.config.output_features[ACTION_KEY].shape[0]

    @property
    def state_range(self) -> Floats | None:
        """float32 (2, S): lowest and highest demonstrated state in the robot's units, if known."""
        return self._demonstrated(self.vector_key, self.state_dim)

    @property
    def action_range(self) -> Floats | None:
        """The same of the actions, (2, A)."""
        return self._demonstrated(ACTION_KEY, self.action_dim)

    def _demonstrated(self, key: str, dim: int) -> Floats | None:
        stats = self.normalization[key].stats if key in self.normalization else {}
        # LeRobot's own, where ours are not: of relative actions those are distances.
        relative = key == ACTION_KEY and bool(self.config.relative_actions)
        names = RANGE if relative or stats.keys() >= set(RANGE) else ("min", "max")
        found = [np.asarray(stats[name]).reshape(-1) for name in names if name in stats]
        if [len(values) for values in found] != [dim, dim] or not np.isfinite(found).all():
            return None
        return np.stack(found).astype(np.float32)

    @property
    def action_scaling(self) -> ActionScaling:
        """What turns the network's chunks into the robot's actions."""
        relative = self.config.relative_actions
        return ActionScaling.of(self.action, self.state_scaling, relative, self.action_range)

    def _keys(self, *types: FeatureType) -> Sequence[str]:
        return [k for k, f in self.config.input_features.items() if f.type in types]

    @property
    def image_keys(self) -> Sequence[str]:
        """The policy's keys of the cameras, in token order."""
        return self._keys(FeatureType.VISUAL)

    @property
    def image_shapes(self) -> dict[str, ImageShape]:
        """(height, width, 3) of every camera's frame, under the robot's keys, in token order."""
        features = self.config.input_features
        sizes = ((key, features[key].shape[1:]) for key in self.image_keys)
        return {self.renamed.get(key, key): (rows, columns, 3) for key, (rows, columns) in sizes}

    @property
    def frame_size(self) -> tuple[int, int]:
        """(H, W) of the area that holds any camera's frame: see `pack_frames`."""
        rows, columns, _ = zip(*self.image_shapes.values(), strict=True)
        return max(rows), max(columns)

    @property
    def state_key(self) -> str:
        """The vector's key on the robot."""
        return self.renamed.get(self.vector_key, self.vector_key)
