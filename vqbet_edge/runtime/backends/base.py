"""What every inference backend does.

A backend holds a bundle's weights on a device, once; each robot has a window of its own on them.

Letters in shapes: N window, K cameras, H and W height and width of a frame as the runtime crops it,
S state width, D token width, C codes per layer, W actions per chunk, A action width.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.backends.forks import never_free_in_forks

Frames = NDArray[np.uint8]  # (K, H, W, 3)
Floats = NDArray[np.float32]
Prefetch: TypeAlias = Literal["thread", "inline", "off"]
# What passes between graphs, by its name in the I/O signatures.
Intermediate: TypeAlias = Literal["frame_tokens", "feature"]


class HeadOutputs(NamedTuple):
    """Output of the code heads, valid until the window's next call.

    When codes are selected sequentially, `logits[1]` lacks the part that depends on the primary
    code; the runtime adds it.
    """

    logits: Floats  # (2, C)
    offsets: Floats  # (2, C, W, A), normalised


class Backend(ABC):
    """A bundle's graphs, loaded on a device: what any number of windows share.

    Windows of one backend may be used by different threads at the same time. A backend is created
    after any fork.
    """

    name: ClassVar[str]
    #: When work is done that the next prediction will need, unless the user says otherwise.
    default_prefetch: ClassVar[Prefetch] = "inline"

    def __init__(self) -> None:
        never_free_in_forks(self)

    @abstractmethod
    def create_window(self) -> "Window":
        """One robot's window: buffers and history, no weights."""


class Window(ABC):
    """Runs the four graphs for one robot and keeps its encoded frames where they are needed.

    Row 0 of the window is the oldest observation, row N - 1 the newest. A window is used by one
    thread at a time.
    """

    #: Whether `prefill` is there and pays.
    can_prefill: ClassVar[bool] = False

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
        """GPT and code heads over the window; `states` is (N, S), normalised."""

    @abstractmethod
    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """A code pair (2,) -> an action chunk (W, A), normalised."""

    def replan(self, frames: Frames, states: Floats, *, prefilled: bool) -> HeadOutputs:
        """Encode the newest frames and predict: the critical path, in one launch where possible.

        Args:
            frames: (K, H, W, 3).
            states: (N, S), normalised.
            prefilled: `prefill` was called just before the window's latest `advance`.
        """
        del prefilled
        self.encode(frames, len(states) - 1)
        return self.predict(states)

    def prefill(self, states: Floats) -> None:
        """Compute what the prediction after the next `advance` needs of rows 1 to N - 1.

        They are encoded already; `states` is (N, S), normalised.
        """
        raise NotImplementedError

    def read(self, tensor: Intermediate) -> Floats:
        """What the latest prediction passed between its graphs, for a proof: not fast.

        Returns:
            A copy: `frame_tokens` of the newest observation (K, D), or the `feature` (F,).
        """
        raise NotImplementedError
