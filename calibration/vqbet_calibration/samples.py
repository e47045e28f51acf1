"""What to calibrate on: pieces of what the robot saw, in three parts.

Random numbers are no source: ranges taken from noise clip what a camera shows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.dataset.samples import PIECE_STEPS, Piece, Place, Sampler

# Of so many blocks one is for choosing, one for verifying, the others are for ranges.
PARTS = 4
MIN_OBSERVATIONS = 64
# Normalised states lie in [-1, 1], or have a deviation of 1; a median this far out is no accident.
_FOREIGN = 5.0


@dataclass(frozen=True)
class Pieces:
    """Some pieces of a source; read anew by every loop, one in memory at a time."""

    sampler: Sampler
    places: tuple[Place, ...]

    def __iter__(self) -> Iterator[Piece]:
        return map(self.sampler.read, self.places)

    @property
    def observations(self) -> int:
        """How many."""
        return sum(place.stop - place.start for place in self.places)

    def of_parts(self, *parts: int) -> "Pieces":
        """Those whose block belongs to some of `PARTS`.

        Drawn, because demonstrations may take turns: every fourth one would show one side only.
        """
        blocks = sorted({place.block for place in self.places})
        order = np.random.default_rng(0).permutation(len(blocks)) % PARTS
        drawn = dict(zip(blocks, order.tolist(), strict=True))
        return Pieces(self.sampler, tuple(p for p in self.places if drawn[p.block] in parts))

    def spread(self, observations: int) -> "Pieces":
        """About so many of the observations, from beginning to end."""
        step = max(1, self.observations // observations)
        return Pieces(self.sampler, self.places[::step])


@dataclass(frozen=True)
class Samples:
    """What to calibrate on.

    Attributes:
        source: as the user named it.
        observations: how many, in all parts.
        calibration: pieces to take ranges from.
        held_out: pieces of other blocks, to choose methods and layers by.
        verification: pieces of yet others, to verify the result on.
        digest: SHA-256 of all pieces, with their places.
    """

    source: str
    observations: int
    calibration: Pieces
    held_out: Pieces
    verification: Pieces
    digest: str


def load_samples(source: str, manifest: Manifest, state_scaling: Affine, steps: int) -> Samples:
    """Take samples for a policy.

    Args:
        source: see `Sampler.open`.
        manifest: of the policy's bundle.
        state_scaling: of its states.
        steps: how many observations, at least `MIN_OBSERVATIONS`.

    Raises:
        DatasetError: too little, constant or damaged data, or another robot's.
    """
    sampler = Sampler.open(source, manifest)
    pieces = Pieces(sampler, tuple(sampler.places(max(steps, MIN_OBSERVATIONS))))
    *for_ranges, choosing, verifying = range(PARTS)
    samples = Samples(
        source=source,
        observations=pieces.observations,
        calibration=pieces.of_parts(*for_ranges),
        held_out=pieces.of_parts(choosing),
        verification=pieces.of_parts(verifying),
        digest=_digest_checked(pieces, manifest, state_scaling),
    )
    if samples.observations < MIN_OBSERVATIONS or not samples.verification.places:
        raise DatasetError(
            f"'{source}' has {samples.observations} usable observations (pieces of {PIECE_STEPS} "
            f"steps), calibration needs at least {MIN_OBSERVATIONS}, better 1024 from many "
            "episodes; record more with policy.record(path)"
        )
    return samples


def _digest_checked(pieces: Pieces, manifest: Manifest, scaling: Affine) -> str:
    """One pass over all pieces."""
    digest, states = hashlib.sha256(), [np.zeros((0, manifest.state_dim), np.float32)]
    first: np.ndarray | None = None
    moving = np.zeros(len(manifest.image_keys), bool)
    for place, piece in zip(pieces.places, pieces, strict=True):
        digest.update(f"{place} {piece.frames.shape}".encode())
        digest.update(piece.frames.tobytes())
        digest.update(piece.states.tobytes())
        states.append(piece.states)
        first = piece.frames[0] if first is None else first
        moving |= (piece.frames != first).any(axis=(0, 2, 3, 4))
    if first is None:
        return digest.hexdigest()
    for key, moves in zip(manifest.image_keys, moving, strict=True):
        if not moves:
            raise DatasetError(
                f"all frames of '{key}' are the same; is the camera covered or disconnected? "
                "Calibrate on what the robot sees while it works"
            )
    if not manifest.state_dim:
        return digest.hexdigest()
    seen = np.concatenate(states)
    medians = np.median(np.abs(scaling.apply(seen, np.empty_like(seen))), axis=0)
    worst = int(medians.argmax())
    if medians[worst] > _FOREIGN:
        raise DatasetError(
            f"'{manifest.state_key}' looks like another robot's: element {worst} is around "
            f"{np.median(seen[:, worst]):g}, {medians[worst]:.0f} times as far from the centre "
            "of the policy's training data as that data reaches; calibrate on data of this robot"
        )
    return digest.hexdigest()
