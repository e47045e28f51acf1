"""Observations to act on: from a data set or a recording, or seeded random ones that vary."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import ImageShape, unpack_frames
from vqbet_edge.runtime.normalization import Affine, Floats
from vqbet_edge.training.dataset.samples import Sampler, random_pieces

MAX_OBSERVATIONS = 200
# They are part of every policy's memory.
MAX_BYTES = 32_000_000


@dataclass(frozen=True)
class Observations:
    """What every policy acts on, over and over.

    Letters: M observations, K cameras, H and W image height and width, S state width.

    Attributes:
        image_shapes: (height, width, 3) of every camera's frame by key, in the policy's own order.
        state_key: of the states.
        frames: uint8 (M, K, H, W, 3), see `pack_frames`.
        states: float32 (M, S), in the robot's units.
    """

    image_shapes: Mapping[str, ImageShape]
    state_key: str
    frames: NDArray[np.uint8]
    states: Floats

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """As `EdgePolicy.act` takes it; starts over behind the last."""
        row = step % len(self)
        images = unpack_frames(self.frames[row], self.image_shapes)
        return {**images, self.state_key: self.states[row]}


def create_observations(bundle: Bundle, source: str | None) -> Observations:
    """Observations that fit a bundle.

    Args:
        bundle: says what the policy observes.
        source: see `Sampler.open`; None makes random observations.

    Raises:
        DatasetError: the source does not fit the policy.
    """
    manifest = bundle.manifest
    frame_bytes = len(manifest.image_keys) * int(np.prod(manifest.frame_shape))
    count = max(1, min(MAX_OBSERVATIONS, MAX_BYTES // frame_bytes))
    scaling = Affine.from_arrays(bundle.arrays, "state", manifest.state_dim)
    if source is None:
        pieces = list(random_pieces(manifest, scaling, count))
    else:
        pieces = list(Sampler.open(source, manifest).pieces(count))
    frames = np.concatenate([piece.frames for piece in pieces])[:count]
    states = np.concatenate([piece.states for piece in pieces])[:count]
    return Observations(manifest.image_shapes, manifest.state_key, frames, states)
