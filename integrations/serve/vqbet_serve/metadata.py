"""What a server says of its policy when a client connects."""

import math
from typing import Annotated

import msgspec

from vqbet_edge import __version__
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.manifest import Manifest

# What a frame may hold besides the observation: keys, prompts, ids.
_SLACK = 64 << 10
_Positive = Annotated[int, msgspec.Meta(ge=1)]


class Feature(msgspec.Struct, frozen=True):
    """A part of the observation: NumPy's name of its type, and its shape."""

    dtype: str
    shape: tuple[_Positive, ...]


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
    """

    policy: str
    server: str
    checkpoint: str
    observation: dict[str, Feature]
    action_dim: _Positive
    action_horizon: int
    action_chunk_size: _Positive
    n_obs_steps: _Positive
    query: str

    @classmethod
    def of(cls, manifest: Manifest) -> "PolicyMetadata":
        """What a bundle's manifest says."""
        images = {key: Feature("uint8", shape) for key, shape in manifest.image_shapes.items()}
        state = Feature("float32", (manifest.state_dim,))
        return cls(
            policy="vqbet",
            server=f"vqbet_edge {__version__}",
            checkpoint=manifest.source.name,
            observation={**images, manifest.state_key: state},
            action_dim=manifest.action_dim,
            action_horizon=1,
            action_chunk_size=manifest.policy.action_chunk_size,
            n_obs_steps=manifest.policy.n_obs_steps,
            query="every_step",
        )

    @classmethod
    def from_frame(cls, frame: bytes) -> "PolicyMetadata":
        """Read a server's first frame.

        Raises:
            UsageError: it comes from a server of another kind.
        """
        try:
            return msgspec.msgpack.decode(frame, type=cls)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"expected the metadata of vqbet-serve, got {error}") from error

    def to_frame(self) -> bytes:
        """Write it."""
        return msgspec.msgpack.encode(self)

    @property
    def largest_frame(self) -> int:
        """Bytes of the largest request: every value as float64, so that a wrong type is named."""
        return _SLACK + 8 * sum(math.prod(part.shape) for part in self.observation.values())
