"""A websocket of an ASGI server, with what a conversation needs of one."""

from collections.abc import AsyncIterator
from typing import Any

from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK
from websockets.frames import Close, CloseCode


class AsgiConnection:
    """See `conversation.Connection`.

    Args:
        websocket: Starlette's, or another with its methods; it is accepted already.
        largest: bytes of the largest message.
    """

    def __init__(self, websocket: Any, largest: int) -> None:  # noqa: ANN401
        self._websocket, self._largest = websocket, largest
        self._open = True

    async def send(self, message: bytes | str) -> None:
        """Send a frame.

        Raises:
            ConnectionClosedOK: the peer has left.
        """
        if not self._open:
            raise ConnectionClosedOK(None, None)
        try:
            if isinstance(message, str):
                await self._websocket.send_text(message)
            else:
                await self._websocket.send_bytes(message)
        except (RuntimeError, OSError) as error:  # what ASGI servers raise then
            self._open = False
            raise ConnectionClosedOK(None, None) from error

    async def recv_streaming(self) -> AsyncIterator[bytes | str]:
        """A message: ASGI servers have put it together.

        Raises:
            ConnectionClosedOK: the peer has left.
            ConnectionClosedError: the message is too large; the connection is closed.
        """
        message = await self._websocket.receive() if self._open else {"type": "left"}
        if message["type"] != "websocket.receive":
            self._open = False
            raise ConnectionClosedOK(None, None)
        data: bytes | str | None = message.get("bytes")
        if data is None:
            data = message.get("text") or ""
        if len(data) > self._largest:
            await self.close(CloseCode.MESSAGE_TOO_BIG, "")
            raise ConnectionClosedError(None, Close(CloseCode.MESSAGE_TOO_BIG, ""))
        yield data

    async def close(self, code: int, reason: str) -> None:
        """Say why, and close; nothing when it is closed."""
        if self._open:
            self._open = False
            try:
                await self._websocket.close(code, reason)
            except (RuntimeError, OSError):
                return
