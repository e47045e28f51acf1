"""The observation window: the newest N observations, each frame encoded once."""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.backends.base import Floats, Frames, HeadOutputs, Window
from vqbet_edge.runtime.manifest import Manifest

Scalar = TypeVar("Scalar", bound=np.generic)


def sliding_windows(rows: NDArray[Scalar], length: int) -> NDArray[Scalar]:
    """The window behind every observation of an episode; the first observation fills the window.

    Rows (M, ...), one per observation -> (M, length, ...), oldest first: a read-only view.
    """
    padded = np.concatenate([np.repeat(rows[:1], length - 1, axis=0), rows])
    return np.moveaxis(np.lib.stride_tricks.sliding_window_view(padded, length, axis=0), -1, 1)


class Slot(NamedTuple):
    """Where one observation is kept."""

    frames: Frames  # uint8 (K, H, W, 3), cropped
    state: Floats  # float32 (S,), normalised


class ObservationWindow:
    """Frames and states of the last `n_obs_steps` observations.

    The first observation fills the window. A frame is encoded when it is asked for, or when a
    prediction needs it; encoded rows move with the window and are never encoded again.

    Observations are checked and written into a slot first and appended later, possibly by another
    thread: `next_slot` is for the thread that acts, everything else for one thread at a time.

    `waiting` observations may wait to be appended at the same time.
    """

    def __init__(self, manifest: Manifest, graphs: Window, waiting: int) -> None:
        self.graphs = graphs
        self._length = manifest.policy.n_obs_steps
        crop, state_dim = manifest.crop, manifest.state_dim
        frames = len(manifest.image_keys), crop.height, crop.width, 3
        # The window's rows, what waits, and one that is being written.
        self._slots = [
            Slot(np.zeros(frames, np.uint8), np.zeros(state_dim, np.float32))
            for _ in range(self._length + waiting + 1)
        ]
        self._next = 0
        #: Observations kept since `clear`, by the thread that acts.
        self.kept = 0
        #: Number of the newest observation that was appended, from 0.
        self.newest_step = -1
        self._rows = self._slots[: self._length]
        self._encoded = [False] * self._length
        self._states: Floats = np.zeros((self._length, state_dim), np.float32)
        self._empty = True
        # Whether the graphs know the keys and values of this window's tail, of its past.
        self._tail_known = self._past_known = False

    def next_slot(self) -> Slot:
        """A slot that nothing uses, the same until `take_slot`."""
        return self._slots[self._next]

    def take_slot(self) -> Slot:
        """Keep what was written to the next slot; it must then be appended."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        self.kept += 1
        return slot

    def clear(self) -> None:
        """Forget everything; the next observation fills the window."""
        self._empty = True
        self.kept, self.newest_step = 0, -1

    def append(self, slot: Slot) -> None:
        """Take a slot as the newest observation."""
        self._past_known, self._tail_known = self._tail_known, False
        self.newest_step += 1
        if self._empty:
            self._rows = [slot] * self._length
            self._states[:] = slot.state
            self.graphs.encode(slot.frames, self._length - 1)
            self.graphs.fill()
            self._encoded = [True] * self._length
            self._empty = self._past_known = False
            return
        self.graphs.advance()
        self._rows.append(slot)
        self._rows.pop(0)
        self._states[:-1] = self._states[1:]
        self._states[-1] = slot.state
        self._encoded.append(False)
        self._encoded.pop(0)

    @property
    def newest_state(self) -> Floats:
        """float32 (S,), normalised: of the newest observation."""
        state: Floats = self._states[-1]
        return state

    def encode_newest(self) -> None:
        """Encode the newest observation now, ahead of the prediction that will need it."""
        self._encode(self._length - 1)

    def prefill(self) -> None:
        """Compute what the next prediction will need of the observations that are here."""
        if self._length == 1 or not self.graphs.can_prefill:
            return
        for row in range(1, self._length):
            self._encode(row)
        self.graphs.prefill(self._states)
        self._tail_known = True

    def predict(self) -> HeadOutputs:
        """Code logits and offsets for the current step."""
        for row in range(self._length - 1):
            self._encode(row)
        if self._encoded[-1]:
            return self.graphs.predict(self._states)
        outputs = self.graphs.replan(
            self._rows[-1].frames, self._states, prefilled=self._past_known
        )
        self._encoded[-1] = True
        return outputs

    def _encode(self, row: int) -> None:
        if not self._encoded[row]:
            self.graphs.encode(self._rows[row].frames, row)
            self._encoded[row] = True
