"""What every inference backend does.

Letters in shapes: B batch, N window, K cameras, H and W image height and width, S state width,
D token width, C codes per layer, W actions per chunk, A action width.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.backends.forks import never_free_in_forks

Frames = NDArray[np.uint8]  # (B, K, H, W, 3)
Floats = NDArray[np.float32]
Idle: TypeAlias = Literal["thread", "inline", "off"]


class HeadOutputs(NamedTuple):
    """Output of the code heads, valid until the backend's next call.

    When codes are selected sequentially, `logits[:, 1]` lacks the part that depends on the
    primary code; the runtime adds it.
    """

    logits: Floats  # (B, 2, C)
    offsets: Floats  # (B, 2, C, W, A), normalised


class Backend(ABC):
    """Runs the four graphs and keeps the window of encoded frames where they need it.

    Row 0 of the window is the oldest observation, row N - 1 the newest. A backend is used by one
    thread at a time and created after any fork.
    """

    name: ClassVar[str]
    #: Whether `prefill` is there and pays.
    can_prefill: ClassVar[bool] = False
    #: Where work is done that can be done ahead, unless the user says otherwise.
    default_idle: ClassVar[Idle] = "inline"

    def __init__(self) -> None:
        #: Stage name -> seconds of its latest run.
        self.seconds: dict[str, float] = {}
        never_free_in_forks(self)

    @abstractmethod
    def advance(self) -> None:
        """Drop the oldest row of the window; the newest row then waits for its frame."""

    @abstractmethod
    def encode(self, frames: Frames, row: int) -> None:
        """Encode one observation's frames into a row of the window."""

    @abstractmethod
    def fill(self) -> None:
        """Copy the newest row over the whole window, as after the first observation."""

    @abstractmethod
    def predict(self, states: Floats) -> HeadOutputs:
        """GPT and code heads over the window; `states` is (B, N, S), normalised."""

    @abstractmethod
    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """Code pairs (B, 2) -> action chunks (B, W, A), normalised."""

    def replan(self, frames: Frames, states: Floats, *, prefilled: bool) -> HeadOutputs:
        """Encode the newest frames and predict: the critical path, in one launch where possible.

        Args:
            frames: (B, K, H, W, 3).
            states: (B, N, S), normalised.
            prefilled: `prefill` was called just before the window's latest `advance`.
        """
        del prefilled
        self.encode(frames, states.shape[1] - 1)
        return self.predict(states)

    def prefill(self, states: Floats) -> None:
        """Compute what the prediction after the next `advance` needs of rows 1 to N - 1.

        They are encoded already; `states` is (B, N, S), normalised.
        """
        raise NotImplementedError
