"""One connection of a server, from its first frame to its last."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from vqbet_edge.errors import (
    ConcurrentUseError,
    DeadlineError,
    HistoryError,
    NonFiniteError,
    ObservationError,
    StaleObservationError,
    UsageError,
)
from vqbet_serve.frames import RESET_DONE, Message, number, pack, text, unpack
from vqbet_serve.keys import UNNAMED
from vqbet_serve.metrics import Metrics
from vqbet_serve.sessions import Session, Sessions

_LOG = logging.getLogger(__name__)
_LONGEST_ID = 256
# Clients send a request in one fragment; a great many empty ones would fill the memory.
_MOST_FRAGMENTS = 64
# A robot that reconnects may come before its old connection's session has ended.
_GRACE_S, _LOOK_S = 1.0, 0.02
# A robot whose link died comes back before the old connection is known to be dead.
_TAKEN_OVER = "a newer connection has taken over this session_id; give every robot an id of its own"
# What the websocket library refuses by itself.
_BROKEN: dict[int, str] = {1002: "ProtocolError", 1007: "InvalidData", 1009: "MessageTooBig"}
# Their texts are about a request. Those of others, and of classes that are made of them, may hold
# paths, addresses and tracebacks.
_TOLD = {
    ConcurrentUseError,
    DeadlineError,
    HistoryError,
    NonFiniteError,
    ObservationError,
    StaleObservationError,
    UsageError,
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
        idle_s: seconds without a request after which a connection's place may be given away; and
            seconds that a request which has begun may take.
        conversations: all that are open.
    """

    sessions: Sessions
    metrics: Metrics
    pool: Executor
    greeting: bytes
    idle_s: float
    conversations: "set[Conversation]" = field(default_factory=set)

    async def compute(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, which runs on a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    def holder(self, name: str | None) -> "Conversation | None":
        """Who has the session of this name; None also where there is no name."""
        holders = (each for each in self.conversations if name in each.sessions)
        return None if name is None else next(holders, None)

    def let_one_go(self, *, driving: bool = False) -> bool:
        """Whether somebody was idle for so long that the place is given away.

        Args:
            driving: a session's place is needed, not only a connection's.
        """
        idle = [each for each in self.conversations if each.idle_s > self.idle_s]
        idle = [each for each in idle if each.sessions or not driving]
        longest = max(idle, key=lambda each: each.idle_s, default=None)
        if longest is not None:
            longest.end(
                UsageError(
                    f"no request for {longest.idle_s:.0f} s, and another robot needs the place; "
                    "connect again, or start the server with a larger --max-robots"
                )
            )
        return longest is not None

    def idle_by_robot(self) -> dict[str, float]:
        """Seconds since the latest request of each robot that is connected."""
        idle: dict[str, float] = {}
        for each in self.conversations:
            idle[each.robot] = max(each.idle_s, idle.get(each.robot, 0.0))
        return idle


class Conversation:
    """Answers one connection's requests, one after the other.

    Args:
        connection: the peer's.
        shared: the server's.
        robot: whose key the peer has.
        admitted: whether the key still holds.

    Attributes:
        sessions: its own, by their ids.
    """

    def __init__(
        self,
        connection: Connection,
        shared: Shared,
        robot: str = UNNAMED,
        admitted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._connection, self._shared = connection, shared
        self.robot, self._admitted = robot, admitted
        self.sessions: dict[str | None, Session] = {}
        self._receiving: asyncio.Task[bytes] | None = None
        self._idle_since = time.monotonic()
        self._ending = False
        self._reason: UsageError | None = None
        self._logged: set[str] = set()
        self._previous_s = 0.0

    @property
    def idle_s(self) -> float:
        """Seconds since its latest request was answered; 0 while one is, or when it ends."""
        idle = self._receiving is not None and not self._ending
        return time.monotonic() - self._idle_since if idle else 0.0

    async def run(self) -> None:
        """Until the client leaves or errs, or `end` is called."""
        self._shared.conversations.add(self)
        try:
            await self._converse()
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code in _BROKEN:
                self._count(_BROKEN[closed.sent.code], closed.sent.reason)
            await self._close_sessions()
        except Exception as error:  # noqa: BLE001 - logged; a peer learns nothing of our insides
            await self._refuse(error)
        else:
            await self._close_sessions()
            await self._connection.close(CloseCode.GOING_AWAY, "the server stops")
        finally:
            self._shared.conversations.discard(self)

    def end(self, reason: UsageError | None = None) -> None:
        """End sessions and connection as soon as no request is being answered.

        Args:
            reason: what the client is told; None: the server stops.
        """
        self._ending, self._reason = True, self._reason or reason
        if self._receiving is not None:
            self._receiving.cancel()

    async def _converse(self) -> None:
        await self._connection.send(self._shared.greeting)
        while not self._ending and (request := await self._request()) is not None:
            if not self._admitted():
                raise UsageError(
                    f"the key of '{self.robot}' was withdrawn; connect with its new one"
                )
            await self._connection.send(await self._answer(unpack(request)))
        if self._reason is not None:
            raise self._reason

    async def _refuse(self, error: Exception) -> None:
        """Tell the client why, and close; its sessions are free before it has taken leave."""
        said = _said(error)
        if type(error) in _TOLD:
            self._count(type(error).__name__, said)
        else:
            _LOG.error("%s: a connection failed", self._who, exc_info=error)
            self._shared.metrics.refusal(said.partition(":")[0])
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(said)
        await self._close_sessions()
        with contextlib.suppress(ConnectionClosed):
            # A close frame has room for 123 bytes.
            short = said.encode(errors="replace")[:120].decode(errors="ignore")
            await self._connection.close(CloseCode.INTERNAL_ERROR, short)

    def _count(self, reason: str, said: str) -> None:
        """Count a refusal; the log has one of a kind per connection, for robots try again."""
        self._shared.metrics.refusal(reason)
        if reason not in self._logged:
            self._logged.add(reason)
            _LOG.warning("%s was refused: %s", self._who, said or reason)

    @property
    def _who(self) -> str:
        address = getattr(self._connection, "remote_address", None)
        return f"robot '{self.robot}'" + (f" at {address[0]}" if address else "")

    async def _close_sessions(self) -> None:
        while self.sessions:
            _, session = self.sessions.popitem()
            await self._shared.compute(partial(self._shared.sessions.close, session))

    async def _request(self) -> bytes | None:
        """A request; None when the conversation ends."""
        self._idle_since = time.monotonic()
        self._receiving = asyncio.ensure_future(self._received())
        try:
            return await self._receiving
        except asyncio.CancelledError:
            if not self._ending:
                raise
            return None
        finally:
            self._receiving = None

    async def _received(self) -> bytes:
        fragments: list[bytes] = []
        late: asyncio.TimerHandle | None = None
        try:
            async for fragment in self._connection.recv_streaming():
                if isinstance(fragment, str):
                    raise UsageError("expected binary frames, got text")
                if late is None:
                    loop, seconds = asyncio.get_running_loop(), self._shared.idle_s
                    reason = UsageError(f"no whole request within {seconds:g} s")
                    late = loop.call_later(seconds, self.end, reason)
                fragments.append(fragment)
                if len(fragments) > _MOST_FRAGMENTS:
                    raise UsageError(f"expected a request in {_MOST_FRAGMENTS} fragments at most")
        finally:
            if late is not None:
                late.cancel()
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
            if type(error) not in _TOLD:
                raise
            # The history is as before, so the next observation may be better.
            self._count(type(error).__name__, _said(error))
            return _said(error)
        finally:
            self._previous_s = time.monotonic() - began

    async def _infer(self, request: Message, session: Session, *, bare: bool) -> bytes:
        """An action (1, A); RoboArena, which names the endpoint, expects it bare."""
        began = time.monotonic()
        action = await self._shared.compute(lambda: session.act(request)[None])
        seconds = time.monotonic() - began
        self._shared.metrics.step(seconds, self.robot)
        timing = {"infer_ms": 1e3 * seconds, "prev_total_ms": 1e3 * self._previous_s}
        return pack(action if bare else {"actions": action, "server_timing": timing})

    async def _session(self, name: str | None) -> Session:
        if name not in self.sessions:
            await self._room(name)
            self.sessions[name] = await self._shared.compute(
                lambda: self._shared.sessions.open(name)
            )
        return self.sessions[name]

    async def _room(self, name: str | None) -> None:
        """Wait for a place; who has this name, or is idle for longest, is asked to leave it."""
        if self._shared.sessions.has_room(name):
            return
        if holder := self._shared.holder(name):
            if holder.robot == self.robot:
                holder.end(UsageError(_TAKEN_OVER))
        elif not await self._close_left():
            self._shared.let_one_go(driving=True)
        end = time.monotonic() + _GRACE_S
        while not self._shared.sessions.has_room(name) and time.monotonic() < end:
            await asyncio.sleep(_LOOK_S)

    async def _close_left(self) -> bool:
        """Whether the client had left a session of its own, as with a new id for every episode."""
        latest = time.monotonic() - self._shared.idle_s
        left = [each for each in self.sessions.values() if each.used < latest]
        for session in left:
            del self.sessions[session.name]
            await self._shared.compute(partial(self._shared.sessions.close, session))
        return bool(left)


def _said(error: Exception) -> str:
    """What a client is told."""
    kind = type(error).__name__ if type(error).__module__ == UsageError.__module__ else ""
    if type(error) in _TOLD:
        return f"{kind}: {error}"
    return f"{kind or 'InternalError'}: the server's log tells more"
