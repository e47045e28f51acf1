"""Robots' windows here, their graphs elsewhere: what connections and replicas of a fleet say.

A request has all that it needs, so any replica may answer it, and another one again if the first is
lost. Letters in shapes as in `vqbet_edge.runtime.backends.base`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import VQBeTEdgeError
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.backends.base import Backend, Floats, Frames, HeadOutputs, Prefetch, Window
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.signatures import signature
from vqbet_serve.batching import Gatherer


class Request(NamedTuple):
    """What a robot wants computed.

    Attributes:
        frames: (K, H, W, 3), to be encoded; with `states`, as the window's newest row.
        rows: (N, K, D), the window's encoded frames.
        states: (N, S), normalised, to predict.
        codes: (2,), to decode.
    """

    frames: Frames | None = None
    rows: Floats | None = None
    states: Floats | None = None
    codes: NDArray[np.int64] | None = None


class Reply(NamedTuple):
    """What was asked for: tokens (K, D), logits (2, C) and offsets (2, C, W, A), a chunk (W, A)."""

    tokens: Floats | None = None
    outputs: HeadOutputs | None = None
    chunk: Floats | None = None


class RemoteBackend(Backend):
    """Windows that send what is to be computed.

    Args:
        manifest: of the bundle that is computed there.
        ask: sends a request; blocks until the reply is there.
    """

    name = "remote"
    default_prefetch: Prefetch = "thread"  # type: ignore[misc]

    def __init__(self, manifest: Manifest, ask: Callable[[Request], Reply]) -> None:
        super().__init__()
        self.manifest, self.ask = manifest, ask

    def create_window(self) -> "RemoteWindow":
        """See `Backend`."""
        return RemoteWindow(self)


class RemoteWindow(Window):
    """A robot's encoded frames."""

    def __init__(self, backend: RemoteBackend) -> None:
        super().__init__(backend)
        self._ask = backend.ask
        shape = signature(backend.manifest, "gpt").inputs[0].shape
        self._rows: Floats = np.zeros(shape[1:], np.float32)  # (N, K, D)

    def advance(self) -> None:
        """See `Window`."""
        self._rows[:-1] = self._rows[1:]

    def encode(self, frames: Frames, row: int) -> None:
        """See `Window`."""
        self._rows[row] = self._ask(Request(frames=frames)).tokens

    def fill(self) -> None:
        """See `Window`."""
        self._rows[:-1] = self._rows[-1]

    def predict(self, states: Floats) -> HeadOutputs:
        """See `Window`."""
        outputs = self._ask(Request(rows=self._rows, states=states)).outputs
        assert outputs is not None  # noqa: S101 - for the type checker
        return outputs

    def replan(self, frames: Frames, states: Floats, *, prefilled: bool) -> HeadOutputs:
        """Encode and predict in one request."""
        del prefilled
        reply = self._ask(Request(frames, self._rows, states))
        assert reply.outputs is not None  # noqa: S101 - for the type checker
        self._rows[-1] = reply.tokens
        return reply.outputs

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """See `Window`."""
        chunk = self._ask(Request(codes=codes)).chunk
        assert chunk is not None  # noqa: S101 - for the type checker
        return chunk


class GraphRunner:
    """Computes requests, several at the same time.

    Args:
        bundle: whose graphs.
        backend: who runs them.

    Raises:
        BackendError: it is missing, or keeps windows on its device.
    """

    def __init__(self, bundle: Bundle, backend: BackendName) -> None:
        self._backend = create_backend(backend, bundle)
        self.most = max(1, self._backend.most_together)
        windows = [self._backend.create_window() for _ in range(self.most)]
        shape = signature(bundle.manifest, "gpt").inputs[0].shape
        windows[0].load(np.zeros(shape[1:], np.float32))
        self._gatherer: Gatherer | None = None
        if self._backend.shared_parts:
            # All that come together are there at once; nobody else is waited for.
            self._gatherer = Gatherer(self._backend, 1.0, lambda _: None)
        self._free: SimpleQueue[Window] = SimpleQueue()
        for window in windows:
            self._free.put(window)
        self._pool = ThreadPoolExecutor(self.most, "vqbet-graphs")

    def run(self, requests: Sequence[Request]) -> list[Reply | VQBeTEdgeError]:
        """The reply to each of up to `most` requests, or what it failed with."""
        return list(self._pool.map(self._run, requests))

    def answer(self, request: Request) -> Reply:
        """The reply to one request.

        Raises:
            VQBeTEdgeError: it cannot be computed.
        """
        (reply,) = self.run([request])
        if isinstance(reply, VQBeTEdgeError):
            raise reply
        return reply

    def close(self) -> None:
        """Free the weights."""
        self._pool.shutdown()
        if self._gatherer is not None:
            self._gatherer.close()
        self._backend.close()

    def _run(self, request: Request) -> Reply | VQBeTEdgeError:
        window = self._free.get()
        predicts = self._gatherer if request.states is not None else None  # others wait for it
        try:
            with nullcontext() if predicts is None else predicts.step():
                return _answer(window, request)
        except VQBeTEdgeError as error:
            return error
        finally:
            self._free.put(window)


def _answer(window: Window, request: Request) -> Reply:
    if request.codes is not None:
        return Reply(chunk=window.decode(request.codes).copy())
    tokens, newest = None, 0
    if request.rows is not None:
        window.load(request.rows)
        newest = len(request.rows) - 1
    if request.frames is not None:
        window.encode(request.frames, newest)
        tokens = window.read("frame_tokens")
    if request.states is None:
        return Reply(tokens)
    return Reply(tokens, HeadOutputs(*(part.copy() for part in window.predict(request.states))))
