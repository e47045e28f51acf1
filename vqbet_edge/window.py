"""The observation window: the newest N observations, each frame encoded once."""

import numpy as np

from vqbet_edge.backends.base import Backend, Floats, Frames, HeadOutputs
from vqbet_edge.manifest import Manifest


class ObservationWindow:
    """Frames and states of the last `n_obs_steps` observations.

    The first observation fills the window. A frame is encoded when `encode_newest` says so, or
    when a prediction needs it; encoded rows move with the window and are never encoded again.
    """

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self._backend = backend
        self._length = manifest.policy.n_obs_steps
        crop = manifest.crop
        cameras, batch = len(manifest.image_keys), manifest.batch_size
        # One buffer more than the window has rows: the next observation is checked and written
        # there while the window still stands.
        self._frames: Frames = np.zeros(
            (self._length + 1, batch, cameras, crop.height, crop.width, 3), np.uint8
        )
        self._buffers = list(range(self._length + 1))
        self._encoded = [False] * self._length
        self._states: Floats = np.zeros((batch, self._length, manifest.state_dim), np.float32)
        self._next_states: Floats = np.zeros((batch, manifest.state_dim), np.float32)
        self._empty = True

    @property
    def next_frames(self) -> Frames:
        """Where the next observation's frames go: uint8 (B, K, H, W, 3)."""
        frames: Frames = self._frames[self._buffers[-1]]
        return frames

    @property
    def next_states(self) -> Floats:
        """Where the next observation's normalised states go: float32 (B, S)."""
        return self._next_states

    def clear(self) -> None:
        """Forget everything; the next observation fills the window."""
        self._empty = True

    def append(self) -> None:
        """Take what was written to `next_frames` and `next_states` as the newest observation."""
        self._buffers.append(self._buffers.pop(0))
        if self._empty:
            self._states[:] = self._next_states[:, None]
            self._encoded = [False] * self._length
            self._backend.encode(self._frames[self._buffers[-2]], self._length - 1)
            self._backend.fill()
            self._encoded = [True] * self._length
            self._empty = False
            return
        self._backend.advance()
        self._states[:, :-1] = self._states[:, 1:]
        self._states[:, -1] = self._next_states
        self._encoded.append(False)
        self._encoded.pop(0)

    def encode_newest(self) -> None:
        """Encode the newest observation now, ahead of the prediction that will need it."""
        self._encode(self._length - 1)

    def predict(self) -> HeadOutputs:
        """Code logits and offsets for the current step."""
        for row in range(self._length - 1):
            self._encode(row)
        if self._encoded[-1]:
            return self._backend.predict(self._states)
        outputs = self._backend.replan(self._frames[self._buffers[-2]], self._states)
        self._encoded[-1] = True
        return outputs

    def _encode(self, row: int) -> None:
        if not self._encoded[row]:
            self._backend.encode(self._frames[self._buffers[row]], row)
            self._encoded[row] = True
