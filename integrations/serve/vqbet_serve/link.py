"""One connection to a server, whose requests run on a thread of their own."""

import contextlib
import socket
import ssl
import time
from itertools import islice

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from vqbet_edge.errors import BackendError, HistoryError, UsageError
from vqbet_edge.runtime.worker import Job, Worker
from vqbet_serve.metadata import PolicyMetadata

# An answer is an action; the metadata grows with the cameras.
_LARGEST_ANSWER = 1 << 20
# Servers send a frame in one fragment; a great many empty ones would fill the memory.
_MOST_FRAGMENTS = 64
# What is shown of a server's text.
_LONGEST_TEXT = 1000


class Link:
    """A connection, until it is lost or closed.

    Args:
        url: the server's.
        api_key: the server's, None where it has none.
        tls: whom to trust; None trusts whom the system trusts.
        seconds: that connecting may take.

    Attributes:
        metadata: what the server says of its policy.
        failure: why the connection is lost; None while it stands.

    Raises:
        BackendError: the server cannot be reached, refuses the key or is of another kind.
    """

    def __init__(
        self, url: str, api_key: str | None, tls: ssl.SSLContext | None, seconds: float
    ) -> None:
        self.failure: str | None = None
        self._url = url
        self._worker: Worker | None = Worker("vqbet-remote", finish=False)
        end = time.monotonic() + seconds
        try:
            self._connection = connect(
                url,
                ssl=tls,
                # A proxy that some variable names has no place between a robot and its policy.
                proxy=None,
                compression=None,
                additional_headers={"Authorization": f"Api-Key {api_key}"} if api_key else None,
                open_timeout=seconds,
                close_timeout=1.0,
                max_size=_LARGEST_ANSWER,
            )
        except (OSError, WebSocketException, ValueError) as error:
            raise BackendError(f"'{url}' cannot be used: {error}") from error
        try:
            self.metadata = self._greeting(max(0.0, end - time.monotonic()))
        except BaseException:
            self.close()
            raise

    def ask(self, frame: bytes) -> "Job[bytes | str]":
        """Send a request, behind earlier ones; the job ends with the answer, or HistoryError.

        Raises:
            HistoryError: the connection is lost already.
        """
        worker = self._worker
        if worker is None:
            raise self.lost()
        return worker.submit(lambda: self._exchange(frame))

    def lose(self, reason: str) -> HistoryError:
        """Give the connection up; the error to raise."""
        self.failure = self.failure or reason
        self.close()
        return self.lost()

    def lost(self) -> HistoryError:
        """The error that says that the connection is lost."""
        return HistoryError(
            f"the connection to '{self._url}' is lost ({self.failure}), and with it the history; "
            "stop the robot and call reset()"
        )

    def close(self) -> None:
        """End the connection at once, though a request may be waiting in it."""
        self.failure = self.failure or "it was closed"
        # Its thread ends with it, and not when the garbage collector finds this object.
        self._worker = None
        # The library's own `close` waits for a thread that hangs in `send`.
        with contextlib.suppress(OSError):  # it is closed already
            self._connection.socket.shutdown(socket.SHUT_RDWR)

    def _greeting(self, seconds: float) -> PolicyMetadata:
        assert self._worker is not None  # noqa: S101 - for the type checker
        job = self._worker.submit(self._received)
        try:
            if not job.done(seconds):
                raise UsageError("it does not say what it serves")
            frame = job.result()
            if isinstance(frame, str):
                raise UsageError(frame)
            return PolicyMetadata.from_frame(frame)
        except (OSError, WebSocketException, UsageError) as error:
            raise BackendError(f"'{self._url}' cannot be used: {error}") from error

    def _exchange(self, frame: bytes) -> bytes | str:
        try:
            self._connection.send(frame)
            return self._received()
        except (OSError, WebSocketException, UsageError) as error:
            raise self.lose(str(error)) from error

    def _received(self) -> bytes | str:
        """A frame; of a text what can be shown."""
        fragments = list(islice(self._connection.recv_streaming(), _MOST_FRAGMENTS + 1))
        if len(fragments) > _MOST_FRAGMENTS:
            raise UsageError(f"expected a frame in {_MOST_FRAGMENTS} fragments at most")
        if isinstance(fragments[0], bytes):
            return b"".join(each for each in fragments if isinstance(each, bytes))
        text = "".join(each for each in fragments if isinstance(each, str))[:_LONGEST_TEXT]
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
