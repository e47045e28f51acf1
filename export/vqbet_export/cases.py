"""Choosing a bundle's reference cases among the observations that the export was verified on."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vqbet_edge.errors import VerificationError
from vqbet_edge.runtime.cases import Case, ReferenceCases, prints
from vqbet_edge.runtime.comparison import clear_of_ties, code_leads
from vqbet_edge.training.dataset.samples import Piece
from vqbet_edge.training.description import runtime_crop
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_export.assembly import is_tabulated
from vqbet_export.reference import Reference, action_spread, constants, run_reference

# The window fills and moves on; so many episodes are enough for the near ties and the codebook.
STEPS, CASES = 8, 3
MAX_CANDIDATES = 64
MAX_FRAME_BYTES = 700_000


class Candidate(NamedTuple):
    """The first steps of a piece, as a bundle would store them."""

    frames: NDArray[np.uint8]  # (M, K, h, w, 3)
    states: NDArray[np.float32]  # (M, S)
    codes: NDArray[np.int64]  # (M, 2)
    leads: NDArray[np.float64]  # (M,), see `code_leads`


class CaseChooser:
    """Collects candidates while an export is verified.

    Args:
        checkpoint: the policy.
        frame: what all cases have in common, see `frame_of`.

    Attributes:
        candidates: pieces that it may choose from.
    """

    def __init__(self, checkpoint: AnyCheckpoint, frame: ReferenceCases) -> None:
        self._checkpoint, self._frame = checkpoint, frame
        self.candidates: list[Candidate] = []

    def choose(self, moved: float, proves: Callable[[ReferenceCases], bool]) -> ReferenceCases:
        """The reference cases: near ties, then whatever adds most codes.

        Args:
            moved: what the verification saw logits move by, in nearly all observations.
            proves: whether the exported graphs themselves are within the limits on some cases:
                coarse frames, where they are needed, are not what the graphs were verified on.

        Raises:
            VerificationError: they are on none.
        """
        chosen: list[Case] = []
        for candidate in self._ranked(moved):
            case = self._case(candidate, moved)
            if proves(replace(self._frame, cases=(case,))):
                chosen.append(case)
            if len(chosen) == CASES:
                break
        if not chosen:
            raise VerificationError(
                "the graphs leave their limits on every reference case, nothing was published; "
                "export with --fp32 or --fp16"
            )
        return replace(self._frame, cases=tuple(chosen))

    def consider(self, piece: Piece, reference: Reference) -> None:
        """Remember a piece if there is room; frames are kept as small as the bundle's."""
        if len(self.candidates) == MAX_CANDIDATES:
            return
        rows, every, outputs = slice(STEPS), self._frame.magnification, reference.outputs
        frames = self._frame.crop.cut(piece.frames[rows])[..., ::every, ::every, :].copy()
        leads = code_leads(outputs.logits[rows])
        self.candidates.append(Candidate(frames, piece.states[rows], outputs.codes[rows], leads))

    def _ranked(self, moved: float) -> Iterator[Candidate]:
        """The nearest tie that is still clear first, then whatever adds most codes."""
        left, seen = list(self.candidates), set[tuple[int, int]]()

        def tie(candidate: Candidate) -> float:
            clear = candidate.leads[clear_of_ties(candidate.leads, moved)]
            return float(clear.min(initial=np.inf))

        best = min(left, key=tie)
        while True:
            yield best
            left = [candidate for candidate in left if candidate is not best]
            seen |= _codes(best)
            if not left:
                return
            best = max(left, key=lambda candidate: len(_codes(candidate) - seen))

    def _case(self, candidate: Candidate, moved: float) -> Case:
        """A candidate with what PyTorch computes for it as it is stored."""
        size = self._checkpoint.frame_size
        images = self._frame.images(candidate.frames, (*size, 3))
        outputs = run_reference(self._checkpoint, Piece(images, candidate.states)).outputs
        return Case(
            frames=candidate.frames,
            states=candidate.states,
            outputs=outputs,
            clear=clear_of_ties(code_leads(outputs.logits), moved),
        )


def frame_of(checkpoint: AnyCheckpoint, reference: Reference) -> ReferenceCases:
    """What all reference cases have in common: no cases yet.

    Frames are stored as coarsely as keeps the file small.

    Args:
        checkpoint: the policy.
        reference: of any observations.
    """
    config = checkpoint.config
    crop = runtime_crop(checkpoint)
    per_frame = MAX_FRAME_BYTES / (CASES * STEPS * len(checkpoint.image_keys) * 3)
    codes = torch.arange(config.vqvae_n_embed if is_tabulated(checkpoint) else 0)
    pairs = torch.cartesian_prod(codes, codes).view(len(codes), len(codes), 2)
    return ReferenceCases(
        crop=crop,
        magnification=int(np.ceil(np.sqrt(max(1, crop.height * crop.width / per_frame)))),
        temperature=config.bet_softmax_temperature,
        spread=action_spread(checkpoint, reference),
        decoded_prints=prints(checkpoint.network.head.vqvae_model.decode(pairs).numpy(), 2),
        constants=constants(checkpoint),
        cases=(),
    )


def _codes(candidate: Candidate) -> set[tuple[int, int]]:
    """(layer, code)."""
    return {(layer, code) for pair in candidate.codes.tolist() for layer, code in enumerate(pair)}
