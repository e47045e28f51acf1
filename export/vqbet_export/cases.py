"""Choosing a bundle's reference cases among the observations that the export was verified on."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import VerificationError
from vqbet_edge.runtime.cases import Case, PolicyOutputs, ReferenceCases
from vqbet_edge.runtime.manifest import CropSpec
from vqbet_edge.runtime.sampling import softmax
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.dataset.samples import Piece
from vqbet_export.reference import Reference, run_reference
from vqbet_export.stages import runtime_crop

Frames = NDArray[np.uint8]

# The window fills and moves on; so many episodes are enough for the near ties and the codebook.
STEPS, CASES = 8, 3
MAX_CANDIDATES = 64
MAX_FRAME_BYTES = 700_000
# Codes count as clear of a tie when their probabilities are so many times further apart than the
# verification saw any probability change: other kernels round otherwise, but not that much.
_CLEARANCE = 4


class Candidate(NamedTuple):
    """The first steps of a piece, as a bundle would store them."""

    frames: Frames  # (M, K, h, w, 3)
    states: NDArray[np.float32]  # (M, S)
    codes: NDArray[np.int64]  # (M, 2)
    margins: NDArray[np.float64]  # (M,), see `code_margins`


class CaseChooser:
    """Collects candidates while an export is verified.

    Args:
        checkpoint: the policy.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._candidates: list[Candidate] = []

    def choose(
        self, uncertainty: float, proves: Callable[[ReferenceCases], bool]
    ) -> ReferenceCases:
        """The reference cases: near ties, then whatever adds most codes.

        Args:
            uncertainty: largest change of a code's probability that the verification saw.
            proves: whether the exported graphs themselves are within the limits on some cases:
                coarse frames, where they are needed, are not what the graphs were verified on.

        Raises:
            VerificationError: they are on none.
        """
        chosen: list[Case] = []
        for candidate in self._ranked(uncertainty):
            case = self._case(candidate, uncertainty)
            if proves(replace(self._geometry, cases=(case,))):
                chosen.append(case)
            if len(chosen) == CASES:
                break
        if not chosen:
            raise VerificationError(
                "the graphs leave their limits on every reference case, nothing was published; "
                "export with --fp32 or --fp16"
            )
        return replace(self._geometry, cases=tuple(chosen))

    @cached_property
    def _geometry(self) -> ReferenceCases:
        """Where the reference looks, and how coarsely frames are stored to keep the file small."""
        config = self._checkpoint.config
        crop = CropSpec(**runtime_crop(config)._asdict())
        per_frame = MAX_FRAME_BYTES / (CASES * STEPS * len(config.image_keys) * 3)
        magnification = int(np.ceil(np.sqrt(max(1, crop.height * crop.width / per_frame))))
        return ReferenceCases(crop, magnification, ())

    def consider(self, piece: Piece, reference: Reference) -> None:
        """Remember a piece if there is room; frames are kept as small as the bundle's."""
        if len(self._candidates) < MAX_CANDIDATES:
            geometry, rows = self._geometry, slice(STEPS)
            every = geometry.magnification
            frames = geometry.crop.cut(piece.frames[rows])[..., ::every, ::every, :].copy()
            outputs = reference.outputs
            margins = code_margins(outputs, self._checkpoint.config.bet_softmax_temperature)
            self._candidates.append(
                Candidate(frames, piece.states[rows], outputs.codes[rows], margins[rows])
            )

    def _ranked(self, uncertainty: float) -> Iterator[Candidate]:
        """The nearest tie that is still clear first, then whatever adds most codes."""
        left, seen = list(self._candidates), set[tuple[int, int]]()

        def tie(candidate: Candidate) -> float:
            clear = candidate.margins[candidate.margins > _CLEARANCE * uncertainty]
            return float(clear.min(initial=np.inf))

        best = min(left, key=tie)
        while True:
            yield best
            left = [candidate for candidate in left if candidate is not best]
            seen |= _codes(best)
            if not left:
                return
            best = max(left, key=lambda candidate: len(_codes(candidate) - seen))

    def _case(self, candidate: Candidate, uncertainty: float) -> Case:
        """A candidate with what PyTorch computes for it as it is stored."""
        config = self._checkpoint.config
        images = self._geometry.images(candidate.frames, (*config.frame_size, 3))
        outputs = run_reference(self._checkpoint, Piece(images, candidate.states)).outputs
        chunks = outputs.decoded_chunk + outputs.offset_chunk
        states = self._checkpoint.inputs[STATE_KEY].apply(candidate.states)
        return Case(
            frames=candidate.frames,
            states=candidate.states,
            outputs=outputs,
            actions=self._checkpoint.action_scaling.apply(chunks, states),
            clear=code_margins(outputs, config.bet_softmax_temperature) > _CLEARANCE * uncertainty,
        )


def code_margins(outputs: PolicyOutputs, temperature: float) -> NDArray[np.float64]:
    """float64 (M,): by how much the most probable code leads, in the closer of the two layers."""
    probabilities = np.sort(softmax(outputs.logits, temperature), axis=-1)  # (M, 2, C)
    leads: NDArray[np.float64] = probabilities[..., -1] - probabilities[..., -2:-1].sum(axis=-1)
    margins: NDArray[np.float64] = leads.min(axis=-1)
    return margins


def _codes(candidate: Candidate) -> set[tuple[int, int]]:
    """(layer, code)."""
    return {(layer, code) for pair in candidate.codes.tolist() for layer, code in enumerate(pair)}
