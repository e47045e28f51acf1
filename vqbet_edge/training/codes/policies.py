"""A checkpoint or a bundle, as the report on its codes asks it.

Letters: P code pairs, M chunks, T steps, C codes per layer, W actions per chunk, A action width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqbet_edge import EdgePolicy, Guards
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.base import HeadOutputs, Window
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import unpack_frames
from vqbet_edge.runtime.hub import is_bundle
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import ActionScaling
from vqbet_edge.runtime.planning import action_scaling, decode_table, secondary_columns
from vqbet_edge.runtime.sampling import CodeSampler, Decision
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.codes.use import Codes, Floats
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.dataset.samples import Piece, Place, Source, check_features, read_piece
from vqbet_edge.training.objectives import PixelScaling

# Frames that are decoded and encoded at once.
_FRAMES = 64


@dataclass(frozen=True)
class PolicyFacts:
    """What a policy is.

    Attributes:
        name: as the user gave it.
        kind: what it was loaded from.
        codes: per layer, C.
        chunk: actions per chunk, W.
        action_dim: A.
        temperature: that codes are drawn with.
        sequential: whether the secondary code is drawn knowing the primary one.
    """

    name: str
    kind: Literal["checkpoint", "bundle"]
    codes: int
    chunk: int
    action_dim: int
    temperature: float
    sequential: bool


class _Said(NamedTuple):
    """The part of a `Decision` that the report is about."""

    codes: Codes
    code_probabilities: Floats
    decoded_chunk: Floats
    offset_chunk: Floats


class Steps(NamedTuple):
    """What a policy says at every step of a piece, its most probable codes taken."""

    codes: Codes  # int64 (T, 2)
    primary: Floats  # (T, C), probabilities
    secondary: Floats  # (T, C), given the primary code
    decoded: Floats  # (T, W, A), normalised
    offset: Floats  # (T, W, A), normalised

    @classmethod
    def of(cls, decisions: Sequence[Decision | _Said]) -> "Steps":
        """From one decision per step."""
        probabilities = np.stack([d.code_probabilities for d in decisions])
        return cls(
            np.stack([d.codes for d in decisions]),
            probabilities[:, 0],
            probabilities[:, 1],
            np.stack([d.decoded_chunk for d in decisions]).astype(np.float64),
            np.stack([d.offset_chunk for d in decisions]).astype(np.float64),
        )


class Reconstructed(NamedTuple):
    """Demonstrated chunks as the codebook has them."""

    codes: Codes  # int64 (M, 2)
    primary: Floats  # (M, W, A), normalised, decoded from the primary code alone
    both: Floats  # (M, W, A), normalised


class CodedPolicy(Protocol):
    """What the report asks a policy.

    Attributes:
        facts: what it is.
        action: network units -> the robot's.
        state_key: of what it observes.
        columns: (C, C), what each primary code adds to the secondary logits, if it does.
        moving_counts: (2, C), how often each code was lately used when phase 1 ended; None where
            that is not kept.
    """

    facts: PolicyFacts
    action: ActionScaling
    state_key: str
    columns: NDArray[np.float32] | None
    moving_counts: Floats | None

    def check(self, source: Source) -> None:
        """Refuse observations that are not this policy's (DatasetError)."""

    def predict(self, source: Source, place: Place) -> Steps:
        """Predict at every step of a place, as a robot that begins there."""

    def decode(self, pairs: Codes) -> Floats:
        """int64 (P, 2) -> (P, W, A), normalised."""

    def reconstruct(self, chunks: Floats) -> "Reconstructed | None":
        """Encode and decode chunks (M, W, A), normalised; a bundle has no encoder: None."""


def load_policy(source: str) -> CodedPolicy:
    """A bundle or a checkpoint, by what is there.

    Raises:
        CheckpointError: it is neither, or not whole.
        BundleError: the bundle is not whole.
        BackendError: there is nothing that runs a bundle.
    """
    if is_bundle(source):
        return BundlePolicy(source)
    return CheckpointPolicy(load_checkpoint(source))


class CheckpointPolicy:
    """A checkpoint in PyTorch; each frame is encoded once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = checkpoint.network.to(self._device)
        self._dtype = next(self._network.parameters()).dtype
        config, head = checkpoint.config, self._network.head
        self._config, self._vqvae = config, head.vqvae_model
        self.facts = PolicyFacts(
            name=checkpoint.name,
            kind="checkpoint",
            codes=config.vqvae_n_embed,
            chunk=config.action_chunk_size,
            action_dim=config.action_dim,
            temperature=config.bet_softmax_temperature,
            sequential=config.sequentially_select,
        )
        self.action = checkpoint.action_scaling
        columns = head.secondary_columns
        self.columns = None if columns is None else columns.cpu().numpy()
        counts = [book.cluster_size[0] for book in self._vqvae.vq_layer.codebooks]
        self.moving_counts: Floats | None = torch.stack(counts).double().cpu().numpy()
        self._observed = checkpoint.observation_shapes
        self._image_keys, self.state_key = list(checkpoint.image_shapes), checkpoint.state_key
        self._state = checkpoint.inputs[STATE_KEY]
        pixels = PixelScaling([checkpoint.inputs[key] for key in config.image_keys])
        self._pixels = pixels.to(self._device, self._dtype)
        self._sampler = CodeSampler(0, config.bet_softmax_temperature, self.columns, seed=0)

    def check(self, source: Source) -> None:
        """See `CodedPolicy`."""
        check_features(source, self._observed)

    def predict(self, source: Source, place: Place) -> Steps:
        """See `CodedPolicy`."""
        return Steps.of(list(self._decisions(source, place)))

    @torch.no_grad()
    def _decisions(self, source: Source, place: Place) -> Iterator[_Said]:
        """Token by token: windows overlap, their frames are encoded once."""
        window = self._config.n_obs_steps
        tokens: Tensor | None = None  # (window - 1, K, D), of the frames before
        states: Tensor | None = None
        for piece in _pieces(source, place, self._image_keys, self.state_key):
            new_tokens, new_states = self._encode(piece)
            if tokens is None or states is None:
                # The first observation fills the window, as in LeRobot's `populate_queues`.
                tokens = new_tokens[:1].expand(window - 1, -1, -1)
                states = new_states[:1].expand(window - 1, -1)
            tokens, states = torch.cat([tokens, new_tokens]), torch.cat([states, new_states])
            features = self._network.features(
                tokens.unfold(0, window, 1).movedim(-1, 1),  # (B, window, K, D)
                states.unfold(0, window, 1).movedim(-1, 1),
            )
            yield from self._decide(features[:, window - 1])
            tokens, states = tokens[len(new_tokens) :], states[len(new_states) :]

    def _encode(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, D) and states (B, S), normalised."""
        pixels = self._pixels(torch.from_numpy(piece.frames).to(self._device))
        states = torch.from_numpy(self._state.apply(piece.states))
        tokens = self._network.encode_images(pixels[None])[0]
        return tokens, states.to(self._device, self._dtype)

    def _decide(self, features: Tensor) -> Iterator[_Said]:
        head = self._network.head
        logits, offsets = head.code_logits(features).cpu().numpy(), head.offsets(features).cpu()
        outputs = [HeadOutputs(*pair) for pair in zip(logits, offsets.numpy(), strict=True)]
        choices = [self._sampler.choose(output) for output in outputs]
        decoded = self.decode(np.stack([choice.codes for choice in choices]))
        for output, choice, chunk in zip(outputs, choices, decoded, strict=True):
            primary, secondary = choice.codes
            offset = output.offsets[0, primary] + output.offsets[1, secondary]
            yield _Said(choice.codes, choice.probabilities, chunk, offset)

    @torch.no_grad()
    def decode(self, pairs: Codes) -> Floats:
        """See `CodedPolicy`."""
        codes = torch.from_numpy(pairs).to(self._device)
        chunks: Floats = self._vqvae.decode(codes).double().cpu().numpy()
        return chunks

    @torch.no_grad()
    def reconstruct(self, chunks: Floats) -> Reconstructed | None:
        """See `CodedPolicy`."""
        vqvae = self._vqvae
        codes = vqvae.encode(torch.from_numpy(chunks).to(self._device, self._dtype)).codes
        latents = vqvae.vq_layer.codebooks[0].embed[0, codes[:, 0]]
        primary = vqvae.decoder(latents).view(-1, *vqvae.chunk_shape)
        both = vqvae.decode(codes)
        return Reconstructed(
            codes.cpu().numpy(), *(c.double().cpu().numpy() for c in (primary, both))
        )


class BundlePolicy:
    """A bundle, run by `EdgePolicy` as on a robot but without action limits."""

    moving_counts: Floats | None = None

    def __init__(self, source: str) -> None:
        bundle = Bundle.open(source)
        manifest, policy = bundle.manifest, bundle.manifest.policy
        self._manifest = manifest
        self.facts = PolicyFacts(
            name=source,
            kind="bundle",
            codes=policy.vqvae_n_embed,
            chunk=policy.action_chunk_size,
            action_dim=manifest.action_dim,
            temperature=policy.bet_softmax_temperature,
            sequential=policy.sequentially_select,
        )
        self.action, self.state_key = action_scaling(bundle), manifest.state_key
        self._table = decode_table(bundle)
        backend = create_backend("auto", bundle)
        free = Guards(action_limits=None)
        self._policy = EdgePolicy(bundle, backend, temperature=0, prefetch="off", guards=free)
        self.columns = secondary_columns(bundle)
        if manifest.secondary_rows > 1:
            self.columns = _rows(manifest, backend.create_window())

    def check(self, source: Source) -> None:
        """See `CodedPolicy`."""
        check_features(source, self._manifest.observation_shapes)

    def predict(self, source: Source, place: Place) -> Steps:
        """See `CodedPolicy`."""
        self._policy.reset()
        shapes = self._manifest.image_shapes
        decisions = []
        for piece in _pieces(source, place, list(shapes), self.state_key):
            for frames, state in zip(piece.frames, piece.states, strict=True):
                decisions.append(self._decide(unpack_frames(frames, shapes), state))
        return Steps.of(decisions)

    def _decide(
        self, frames: dict[str, NDArray[np.uint8]], state: NDArray[np.float32], *codes: int
    ) -> Decision:
        observation = {**frames, self.state_key: state}
        self._policy.act_chunk(observation, codes=codes or None)
        assert self._policy.last is not None  # noqa: S101 - for the type checker
        return self._policy.last

    def decode(self, pairs: Codes) -> Floats:
        """See `CodedPolicy`."""
        if self._table is not None:
            return self._table[pairs[:, 0], pairs[:, 1]].astype(np.float64)
        # Too large to be tabulated: the pairs are forced, whatever is observed.
        manifest = self._manifest
        frames = {key: np.zeros(shape, np.uint8) for key, shape in manifest.image_shapes.items()}
        state = np.zeros(manifest.state_dim, np.float32)
        chunks = [self._decide(frames, state, *pair).decoded_chunk for pair in pairs.tolist()]
        return np.array(chunks, np.float64).reshape(-1, self.facts.chunk, self.facts.action_dim)

    def reconstruct(self, chunks: Floats) -> Reconstructed | None:  # noqa: ARG002
        """See `CodedPolicy`."""
        return None


def _rows(manifest: Manifest, window: Window) -> NDArray[np.float32]:
    """(C, C): secondary logits given every primary code, of no observation in particular.

    The head is affine in the primary code's one-hot, so rows differ by the same everywhere.
    """
    policy, crop = manifest.policy, manifest.crop
    frames = np.zeros((len(manifest.image_keys), crop.height, crop.width, 3), np.uint8)
    window.encode(frames, policy.n_obs_steps - 1)
    window.fill()
    states = np.zeros((policy.n_obs_steps, manifest.state_dim), np.float32)
    rows = window.predict(states).logits[1:].copy()
    window.close()
    return rows


def _pieces(
    source: Source, place: Place, image_keys: Sequence[str], state_key: str
) -> Iterator[Piece]:
    """A place in blocks that fit into memory whatever the camera."""
    for start in range(place.start, place.stop, _FRAMES):
        stop = min(start + _FRAMES, place.stop)
        yield read_piece(source, place._replace(start=start, stop=stop), image_keys, state_key)
