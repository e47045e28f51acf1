"""One connection of a server, from its first frame to its last."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from vqbet_edge import ObservationError, UsageError, VQBeTEdgeError
from vqbet_serve.frames import RESET_DONE, Message, number, pack, text, unpack
from vqbet_serve.metrics import Metrics
from vqbet_serve.sessions import Session, Sessions

_LONGEST_ID = 256
# Clients send a request in one fragment; a great many empty ones would fill the memory.
_MOST_FRAGMENTS = 64
# A robot that reconnects may come before its old connection's session has ended.
_GRACE_S, _LOOK_S = 1.0, 0.02
# What the websocket library refuses by itself.
_BROKEN: dict[int, str] = {
    CloseCode.PROTOCOL_ERROR: "ProtocolError",
    CloseCode.INVALID_DATA: "InvalidData",
    CloseCode.MESSAGE_TOO_BIG: "MessageTooBig",
}
_Result = TypeVar("_Result")


class Connection(Protocol):
    """A websocket; its methods raise websockets' `ConnectionClosed` once there is none."""

    async def send(self, message: bytes | str, /) -> None:
        """Send a message."""

    def recv_streaming(self) -> AsyncIterator[bytes | str]:
        """The fragments of a message."""

    async def close(self, code: int, reason: str) -> None:
        """Close it; nothing when it is closed."""


@dataclass(frozen=True)
class Shared:
    """What all connections of a server have in common.

    Attributes:
        sessions, metrics: the server's.
        pool: computes, for nothing may block the event loop.
        greeting: the metadata's frame.
        idle_s: seconds that a client may take for its next request.
    """

    sessions: Sessions
    metrics: Metrics
    pool: Executor
    greeting: bytes
    idle_s: float

    async def compute(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, which runs on a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)


class Conversation:
    """Answers one connection's requests, one after the other."""

    def __init__(self, connection: Connection, shared: Shared) -> None:
        self._connection, self._shared = connection, shared
        self._own: dict[str | None, Session] = {}
        self._waiting = self._ending = False
        self._previous_s = 0.0

    async def run(self) -> None:
        """Until the client leaves, errs or is silent for too long, or `end` is called.

        Raises:
            Exception: what is our own bug; the connection is then still open.
        """
        try:
            await self._connection.send(self._shared.greeting)
            while not self._ending:
                answer = await self._answer(unpack(await self._request()))
                await self._connection.send(answer)
            await self._connection.close(CloseCode.GOING_AWAY, "the server stops")
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code in _BROKEN:
                self._shared.metrics.refusal(_BROKEN[closed.sent.code])
        except VQBeTEdgeError as error:
            self._shared.metrics.refusal(type(error).__name__)
            await self.refuse(_said(error))

    async def end(self) -> None:
        """Close the connection as soon as no request is being answered."""
        self._ending = True
        if self._waiting:
            await self._connection.close(CloseCode.GOING_AWAY, "the server stops")

    async def refuse(self, reason: str) -> None:
        """Tell the client why, and close."""
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(reason)
            # A close frame has room for 123 bytes.
            short = reason.encode(errors="replace")[:120].decode(errors="ignore")
            await self._connection.close(CloseCode.INTERNAL_ERROR, short)

    async def close_sessions(self) -> None:
        """End this connection's sessions."""
        while self._own:
            _, session = self._own.popitem()
            await self._shared.compute(partial(self._shared.sessions.close, session))

    async def _request(self) -> bytes:
        self._waiting = True
        try:
            return await asyncio.wait_for(self._received(), self._shared.idle_s)
        except asyncio.TimeoutError as error:  # not TimeoutError before Python 3.11
            raise UsageError(f"no request within {self._shared.idle_s:g} s") from error
        finally:
            self._waiting = False

    async def _received(self) -> bytes:
        fragments = []
        async for fragment in self._connection.recv_streaming():
            if isinstance(fragment, str):
                raise UsageError("expected binary frames, got text")
            fragments.append(fragment)
            if len(fragments) > _MOST_FRAGMENTS:
                raise UsageError(f"expected a request in {_MOST_FRAGMENTS} fragments at most")
        return b"".join(fragments)

    async def _answer(self, request: Message) -> bytes | str:
        began = time.monotonic()
        endpoint = text(request, "endpoint", _LONGEST_ID)
        session = await self._session(text(request, "session_id", _LONGEST_ID))
        try:
            match endpoint:
                case "reset":
                    seed = number(request, "seed")
                    await self._shared.compute(lambda: session.reset(seed))
                    return RESET_DONE
                case None | "infer":
                    return await self._infer(request, session, bare=endpoint is not None)
                case _:
                    raise UsageError("expected the endpoint 'infer' or 'reset'")
        except ObservationError as error:
            # The history is as before, so the next observation may be better.
            self._shared.metrics.refusal(type(error).__name__)
            return _said(error)
        finally:
            self._previous_s = time.monotonic() - began

    async def _infer(self, request: Message, session: Session, *, bare: bool) -> bytes:
        """An action (1, A); RoboArena, which names the endpoint, expects it bare."""
        began = time.monotonic()
        action = await self._shared.compute(lambda: session.act(request)[None])
        seconds = time.monotonic() - began
        self._shared.metrics.step(seconds)
        timing = {"infer_ms": 1e3 * seconds, "prev_total_ms": 1e3 * self._previous_s}
        return pack(action if bare else {"actions": action, "server_timing": timing})

    async def _session(self, name: str | None) -> Session:
        if name not in self._own:
            await self._close_left()
            await self._room(name)
            self._own[name] = await self._shared.compute(lambda: self._shared.sessions.open(name))
        return self._own[name]

    async def _close_left(self) -> None:
        """End the sessions that the client has left, as with a new id for every episode."""
        latest = time.monotonic() - self._shared.idle_s
        for session in [each for each in self._own.values() if each.used < latest]:
            del self._own[session.name]
            await self._shared.compute(partial(self._shared.sessions.close, session))

    async def _room(self, name: str | None) -> None:
        end = time.monotonic() + _GRACE_S
        while not self._shared.sessions.has_room(name) and time.monotonic() < end:
            await asyncio.sleep(_LOOK_S)


def _said(error: VQBeTEdgeError) -> str:
    return f"{type(error).__name__}: {error}"
