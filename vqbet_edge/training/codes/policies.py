"""A checkpoint or a bundle, as the report on its codes asks it.

Letters: P code pairs, M chunks, T steps, C codes per layer, W actions per chunk, A action width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vqbet_edge import EdgePolicy, Guards
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.backends.base import Backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import unpack_frames
from vqbet_edge.runtime.planning import action_scaling, decode_table, secondary_columns
from vqbet_edge.runtime.sampling import Decision
from vqbet_edge.training.backend import TorchBackend
from vqbet_edge.training.codes.use import Codes, Floats
from vqbet_edge.training.dataset.samples import Place, Source, read_piece

# Frames that are read at once.
_FRAMES = 64


@dataclass(frozen=True)
class CodedFacts:
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


class Reconstructed(NamedTuple):
    """Demonstrated chunks as the codebook has them."""

    codes: Codes  # int64 (M, 2)
    primary: Floats  # (M, W, A), normalised, decoded from the primary code alone
    both: Floats  # (M, W, A), normalised


class CodedPolicy:
    """A policy that takes the most probable codes, without action limits.

    Attributes:
        facts: what it is.
        manifest: likewise.
        action: network units -> the robot's.
        columns: (C, C), what each primary code adds to the secondary logits; None: nothing.
        vqvae: the trained codebook; a bundle has no encoder: None.
    """

    def __init__(self, name: str, bundle: Bundle, backend: Backend) -> None:
        self.manifest, policy = bundle.manifest, bundle.manifest.policy
        if policy.tokens_per_step == len(self.manifest.image_keys):
            raise UsageError(
                f"'{name}' is a policy of {self.manifest.source.writer}, whose secondary logits "
                "depend on the primary code in another way at every step; the report on codes is "
                "for LeRobot's policies"
            )
        torch_backend = backend if isinstance(backend, TorchBackend) else None
        self.vqvae = None if torch_backend is None else torch_backend.network.head.vqvae_model
        self.facts = CodedFacts(
            name=name,
            kind="bundle" if torch_backend is None else "checkpoint",
            codes=policy.vqvae_n_embed,
            chunk=policy.action_chunk_size,
            action_dim=self.manifest.action_dim,
            temperature=policy.bet_softmax_temperature,
            sequential=policy.sequentially_select,
        )
        self.action, self._table = action_scaling(bundle), decode_table(bundle)
        free = Guards(action_limits=None)
        self._policy = EdgePolicy(bundle, backend, temperature=0, prefetch="off", guards=free)
        self._window = backend.create_window()
        several = self.manifest.secondary_rows > 1
        self.columns = self._secondary_rows() if several else secondary_columns(bundle)

    def _secondary_rows(self) -> NDArray[np.float32]:
        """(C, C): secondary logits given every primary code, of no observation in particular.

        The head is affine in the primary code's one-hot, so rows differ by the same everywhere.
        """
        crop, steps = self.manifest.crop, self.manifest.policy.n_obs_steps
        shape = len(self.manifest.image_keys), crop.height, crop.width, 3
        self._window.encode(np.zeros(shape, np.uint8), steps - 1)
        self._window.fill()
        states = np.zeros((steps, self.manifest.state_dim), np.float32)
        return self._window.predict(states).logits[1:].copy()

    def predict(self, source: Source, place: Place) -> list[Decision]:
        """Decide at every step of a place, as a robot that begins there."""
        shapes, state_key, decisions = self.manifest.image_shapes, self.manifest.state_key, []
        self._policy.reset()
        for start in range(place.start, place.stop, _FRAMES):
            part = place._replace(start=start, stop=min(start + _FRAMES, place.stop))
            piece = read_piece(source, part, self.manifest)
            for frames, state in zip(piece.frames, piece.states, strict=True):
                self._policy.act_chunk({**unpack_frames(frames, shapes), state_key: state})
                decisions.append(self._policy.last)
        return [decision for decision in decisions if decision is not None]

    def decode(self, pairs: Codes) -> Floats:
        """int64 (P, 2) -> (P, W, A), normalised."""
        if self.vqvae is not None:
            return self._window.decode(pairs).astype(np.float64)
        if self._table is not None:
            return self._table[pairs[:, 0], pairs[:, 1]].astype(np.float64)
        return np.array([self._window.decode(pair).copy() for pair in pairs], np.float64)

    @torch.no_grad()
    def reconstruct(self, chunks: Floats) -> Reconstructed:
        """Encode and decode chunks (M, W, A), normalised, by the `vqvae`."""
        assert self.vqvae is not None  # noqa: S101 - see there
        book = self.vqvae.vq_layer.codebooks[0].embed[0]
        codes = self.vqvae.encode(torch.from_numpy(chunks).to(book)).codes
        primary = self.vqvae.decoder(book[codes[:, 0]]).view(-1, *self.vqvae.chunk_shape)
        decoded = (x.double().cpu().numpy() for x in (primary, self.vqvae.decode(codes)))
        return Reconstructed(codes.cpu().numpy(), *decoded)
