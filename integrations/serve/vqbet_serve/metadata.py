"""What a server says of its policy when a client connects."""

import math
from typing import Annotated, Literal

import msgspec

from vqbet_edge import __version__
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.manifest import Manifest, Text
from vqbet_serve.frames import check_values

# What a frame may hold besides the observation: cameras that are not looked at, or that are larger
# than they should be and are to be named. Five of 1080p.
_SLACK = 32 << 20
# What a server says is bounded, for the robot makes arrays of it and counts with it.
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Rate = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class Feature(msgspec.Struct, frozen=True):
    """A part of the observation: NumPy's name of its type, and its shape."""

    dtype: Literal["uint8", "float32"]
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=8)]


class PolicyMetadata(msgspec.Struct, frozen=True):
    """The first frame of a connection.

    Attributes:
        policy: always `vqbet`.
        server: who serves, and its version.
        checkpoint: the name of what was exported.
        observation: what the policy looks at, by key.
        action_dim: values of an action.
        action_horizon: actions in an answer, always 1.
        action_chunk_size: actions that the policy plans at once, on the server.
        n_obs_steps: observations in the history.
        query: `every_step`, for the history advances with every observation.
        fps: observations per second that the policy was trained with; None where not known.
    """

    policy: Text
    server: Text
    checkpoint: Text
    observation: Annotated[dict[Text, Feature], msgspec.Meta(max_length=64)]
    action_dim: _Size
    action_horizon: int
    action_chunk_size: _Size
    n_obs_steps: _Size
    query: Text
    fps: _Rate | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> "PolicyMetadata":
        """What a bundle's manifest says."""
        cameras = manifest.image_shapes
        observed = {
            key: Feature("uint8" if key in cameras else "float32", shape)
            for key, shape in manifest.observation_shapes.items()
        }
        return cls(
            policy="vqbet",
            server=f"vqbet_edge {__version__}",
            checkpoint=manifest.source.name,
            observation=observed,
            action_dim=manifest.action_dim,
            action_horizon=1,
            action_chunk_size=manifest.policy.action_chunk_size,
            n_obs_steps=manifest.policy.n_obs_steps,
            query="every_step",
            fps=manifest.fps,
        )

    @classmethod
    def from_frame(cls, frame: bytes) -> "PolicyMetadata":
        """Read a server's first frame.

        Raises:
            UsageError: it comes from a server of another kind.
        """
        check_values(frame)
        try:
            return msgspec.msgpack.decode(frame, type=cls)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"expected the metadata of vqbet-serve, got {error}") from error

    def to_frame(self) -> bytes:
        """Write it."""
        return msgspec.msgpack.encode(self)

    @property
    def largest_frame(self) -> int:
        """Bytes of the largest request: every value as float32, and room for what is not read."""
        return _SLACK + 4 * sum(math.prod(part.shape) for part in self.observation.values())
