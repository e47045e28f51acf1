"""What every inference backend does.

A backend holds a bundle's weights on a device, once; each robot has a window of its own on them.

Letters in shapes: N window, K cameras, H and W height and width of a frame as the runtime crops it,
S state width, D token width, C codes per layer, W actions per chunk, A action width.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple, TypeAlias
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import BackendError, VQBeTEdgeError
from vqbet_edge.runtime.backends.forks import never_free_in_forks

Frames = NDArray[np.uint8]  # (K, H, W, 3)
Floats = NDArray[np.float32]
Prefetch: TypeAlias = Literal["thread", "inline", "off"]
# Runs of the transformer: over a whole window, over all but the newest observation ahead of time,
# over the newest one behind that.
GptRun: TypeAlias = Literal["window", "prefill", "newest"]
# What graphs put out, by its name in the I/O signatures.
Intermediate: TypeAlias = Literal["frame_tokens", "feature", "logits", "offsets"]


class HeadOutputs(NamedTuple):
    """Output of the code heads, valid until the window's next call.

    `logits[0]` are the primary code's. The secondary code's are one row or, when codes are selected
    sequentially, one for every primary code (C rows).
    """

    logits: Floats  # (1 + R, C)
    offsets: Floats  # (2, C, W, A), normalised


class _Closable:
    """Something to be closed once, and never by a forked process, whose copy is not its own."""

    def __init__(self) -> None:
        self.closed = False
        self._process = os.getpid()
        never_free_in_forks(self)

    def close(self) -> None:
        """Free its memory on the device, after which it cannot be used; nothing when repeated."""
        if not self.closed and self._process == os.getpid():
            self.closed = True
            self._free()

    def _free(self) -> None:
        """What `close` frees that Python would not free by itself."""

    def check_open(self) -> None:
        """Raise BackendError when it is closed."""
        if self.closed:
            raise BackendError("the policy's backend is closed; load the policy again")


class Backend(_Closable, ABC):
    """A bundle's graphs, loaded on a device: what any number of windows share.

    Windows of one backend may be used by different threads at the same time. A backend is created
    after any fork. `close` closes its windows first, and the last window that is closed closes it.
    """

    name: ClassVar[str]
    #: When work is done that the next prediction will need, unless the user says otherwise.
    default_prefetch: ClassVar[Prefetch] = "inline"
    #: What windows can share a run of; nothing where they cannot, or gain nothing.
    shared_parts: tuple[GptRun, ...] = ()
    #: Windows that one `run_together` takes.
    most_together: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.windows: WeakSet[Window] = WeakSet()
        #: Runs one of `shared_parts` for a window, by `run_together` or the window's `run_alone`:
        #: set by whoever drives several robots. None runs it alone.
        self.run_shared: Callable[[Window, GptRun], None] | None = None

    @abstractmethod
    def create_window(self) -> "Window":
        """One robot's window: buffers and history, no weights."""

    def run_together(self, part: GptRun, windows: Sequence["Window"]) -> None:
        """Run a part for 2 to `most_together` windows at once; it is the next that each needs.

        What a window gets depends on the others by rounding only. One call per part at a time.
        """
        raise NotImplementedError

    def close(self) -> None:
        """See the class."""
        for window in list(self.windows):
            window.close()
        super().close()


class Window(_Closable, ABC):
    """Runs the four graphs for one robot and keeps its encoded frames where they are needed.

    Row 0 of the window is the oldest observation, row N - 1 the newest. A window is used, and
    closed, by one thread at a time.
    """

    #: Whether `prefill` is there and pays.
    can_prefill: ClassVar[bool] = False

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        backend.check_open()
        #: Stage name -> seconds of its latest run.
        self.seconds: dict[str, float] = {}
        # Held, so that in a fork it is not freed either.
        self._backend = backend
        backend.windows.add(self)

    def close(self) -> None:
        """Close the window, and the backend if it has no other."""
        super().close()
        self._backend.windows.discard(self)
        if not self._backend.windows:
            self._backend.close()

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
        """Encode the newest frames (K, H, W, 3) and predict, in one launch where possible.

        `prefilled`: `prefill` was called just before the window's latest `advance`.
        """
        del prefilled
        self.encode(frames, len(states) - 1)
        return self.predict(states)

    def prefill(self, states: Floats) -> None:
        """Compute what the prediction after the next `advance` needs of rows 1 to N - 1.

        They are encoded already; `states` is (N, S), normalised.
        """
        raise NotImplementedError

    def load(self, tokens: Floats) -> None:
        """Take encoded frames (N, K, D) as the window of a robot that keeps them elsewhere."""
        del tokens
        raise BackendError(
            f"the backend '{self._backend.name}' keeps windows on its device; where they are "
            "elsewhere, take --backend onnxruntime"
        )

    def run_alone(self, part: GptRun) -> None:
        """Run a part for this window; see `Backend.run_shared`."""
        raise NotImplementedError

    def read(self, tensor: Intermediate) -> Floats:
        """A copy of what the latest prediction's graphs put out, for a proof: not fast.

        `frame_tokens` of the newest observation (K, D), the `feature` (F,), `logits` (1 + R, C) or
        `offsets` (2, C, W, A).
        """
        raise NotImplementedError


@contextmanager
def foreign_errors(doing: str) -> Iterator[None]:
    """Turn what a library raises into our error, so that users and `auto` can handle it."""
    try:
        yield
    except VQBeTEdgeError:
        raise
    except Exception as error:
        raise BackendError(f"{doing} failed: {type(error).__name__}: {error}") from error
