"""The websocket server: openpi's protocol around `EdgePolicy`.

On connecting, the server sends its metadata. Every request is one binary frame with an observation,
every answer one binary frame with `actions` (1, A) and `server_timing`. A text frame is an error.
RoboArena's `endpoint` and `reset` and vllm-omni's `session_id` are understood. The policy wants one
observation per control step (`query: every_step`), for its history advances with each.
"""

import asyncio
import contextlib
import hmac
import http
import logging
import math
import signal
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from vqbet_edge import EdgePolicy, ObservationError, UsageError, VQBeTEdgeError, __version__
from vqbet_edge.runtime.manifest import Manifest
from vqbet_serve.frames import FrameError, pack, unpack
from vqbet_serve.metrics import CONTENT_TYPE, Metrics
from vqbet_serve.sessions import MAX_ID_LENGTH, Session, Sessions

_LOG = logging.getLogger(__name__)
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
# What a frame holds besides the observation: keys, prompts, session id.
_FRAME_SLACK = 64 << 10
_INTERNAL = 1011


@dataclass(frozen=True)
class ServeConfig:
    """How to serve.

    Attributes:
        host, port: where to listen; port 0 takes any free one.
        api_key: what clients must send; without one only loopback addresses are served.
        tls: certificate and key for wss://.
        seed: start of the random sequence of sessions without an id.
        max_robots: sessions at the same time.
        idle_s: seconds without a request after which a connection is closed.
        workers: threads that compute; None takes one per processor.

    Raises:
        UsageError: a value is out of range, or an open address has no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    seed: int = 0
    max_robots: int = 16
    idle_s: float = 30.0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.host not in _LOOPBACK and not self.api_key:
            raise UsageError(
                f"'{self.host}' can be reached from other machines, and whoever reaches it moves "
                "robots: pass --api-key-file FILE, or listen on 127.0.0.1"
            )
        if self.max_robots < 1 or not 0 < self.idle_s < math.inf or self.seed < 0:
            raise UsageError("expected --max-robots of 1, --idle-s above 0 and --seed of 0 or more")


def read_key(path: Path) -> str:
    """The key in a file: one line.

    Raises:
        UsageError: it is too short to be a secret.
    """
    key = path.read_text().strip()
    if len(key) < 16:
        raise UsageError(f"'{path}' holds {len(key)} characters, expected a key of 16 or more")
    return key


def metadata(manifest: Manifest) -> dict[str, Any]:
    """What a client must know of the policy, sent on connecting."""
    images = {key: {"dtype": "uint8", "shape": manifest.image_shape} for key in manifest.image_keys}
    state = {"dtype": "float32", "shape": (manifest.state_dim,)}
    return {
        "policy": "vqbet",
        "server": f"vqbet_edge {__version__}",
        "checkpoint": manifest.source.name,
        "observation": {**images, manifest.state_key: state},
        "action_dim": manifest.action_dim,
        "action_horizon": 1,
        "action_chunk_size": manifest.policy.action_chunk_size,
        "n_obs_steps": manifest.policy.n_obs_steps,
        "query": "every_step",
    }


def largest_frame(manifest: Manifest) -> int:
    """Bytes of the largest request: frames as float32, state as float64."""
    images = len(manifest.image_keys) * math.prod(manifest.image_shape) * 4
    return images + manifest.state_dim * 8 + _FRAME_SLACK


class PolicyServer:
    """Serves a policy until `stop`.

    Args:
        policy: a loaded policy; robots get its siblings.
        config: how to serve.
    """

    def __init__(self, policy: EdgePolicy, config: ServeConfig) -> None:
        self._config, self.metrics = config, Metrics()
        self.sessions = Sessions(policy, config.seed, config.max_robots)
        self._metadata = pack(metadata(policy.manifest))
        self._max_size = largest_frame(policy.manifest)
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="vqbet-serve")
        self._server: Server | None = None

    async def start(self) -> int:
        """Listen; the port."""
        self._server = await serve(
            self._handle,
            self._config.host,
            self._config.port,
            ssl=self._config.tls,
            process_request=self._answer_http,
            max_size=self._max_size,
            # A request and the one behind it: more would be a queue of stale observations.
            max_queue=2,
            compression=None,
        )
        port: int = next(iter(self._server.sockets)).getsockname()[1]
        return port

    async def stop(self) -> None:
        """Answer what is being computed, refuse what comes, close every connection."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        self._pool.shutdown()

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Plain HTTP paths and keys; None lets the websocket open."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._knows_key(request.headers):
            self.metrics.refusal("Unauthorized")
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected a valid Api-Key\n")
        if path == "/metrics":
            response = connection.respond(
                http.HTTPStatus.OK, self.metrics.text(len(self.sessions))
            )
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        return None

    def _knows_key(self, headers: Headers) -> bool:
        if self._config.api_key is None:
            return True
        given = headers.get_all("Authorization")
        expected = f"Api-Key {self._config.api_key}".encode()
        return len(given) == 1 and hmac.compare_digest(given[0].encode(), expected)

    async def _handle(self, connection: ServerConnection) -> None:
        """One connection's life."""
        own: dict[str | None, Session] = {}
        try:
            await connection.send(self._metadata)
            await self._converse(connection, own)
        except ConnectionClosed:
            pass
        except VQBeTEdgeError as error:
            self.metrics.refusal(type(error).__name__)
            await self._close(connection, str(error))
        except Exception:
            # Ours to find in the log; a peer learns nothing of our insides.
            _LOG.exception("a connection failed")
            self.metrics.refusal("internal")
            await self._close(connection, "internal error; the server's log tells")
        finally:
            for name in own:
                self.sessions.close(name)

    async def _close(self, connection: ServerConnection, reason: str) -> None:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(reason)
            await connection.close(_INTERNAL, reason.encode()[:120].decode(errors="ignore"))

    async def _converse(
        self, connection: ServerConnection, own: dict[str | None, Session]
    ) -> None:
        previous = 0.0
        while True:
            try:
                frame = await asyncio.wait_for(connection.recv(), self._config.idle_s)
            except asyncio.TimeoutError as error:  # not TimeoutError before Python 3.11
                raise UsageError(f"no request for {self._config.idle_s:g} s") from error
            began = time.monotonic()
            if isinstance(frame, str):
                raise FrameError("expected binary frames, got text")
            request = unpack(frame)
            session = self._session(request, own)
            try:
                answer = await self._answer(request, session, previous)
            except ObservationError as error:
                # The history is as before, so the next observation may be better.
                self.metrics.refusal(type(error).__name__)
                answer = str(error)
            await connection.send(answer)
            previous = time.monotonic() - began

    def _session(self, request: dict[str, Any], own: dict[str | None, Session]) -> Session:
        name = request.get("session_id")
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= MAX_ID_LENGTH):
            raise FrameError(f"expected a session_id of 1 to {MAX_ID_LENGTH} characters")
        if name not in own:
            self._close_idle(own)
            own[name] = self.sessions.open(name)
        return own[name]

    def _close_idle(self, own: dict[str | None, Session]) -> None:
        """End a connection's sessions that it has left, as with a new id for every episode."""
        latest = time.monotonic() - self._config.idle_s
        for name in [name for name, session in own.items() if session.used < latest]:
            del own[name]
            self.sessions.close(name)

    async def _answer(
        self, request: dict[str, Any], session: Session, previous: float
    ) -> bytes | str:
        loop = asyncio.get_running_loop()
        match request.get("endpoint", "infer"):
            case "reset":
                seed = self.sessions.seed(request.get("session_id"))
                await loop.run_in_executor(self._pool, session.reset, seed)
                return "reset successful"
            case "infer":
                began = time.monotonic()
                action = await loop.run_in_executor(self._pool, session.act, request)
                seconds = time.monotonic() - began
                self.metrics.step(seconds)
                timing = {"infer_ms": 1e3 * seconds, "prev_total_ms": 1e3 * previous}
                return pack({"actions": action[None], "server_timing": timing})
            case _:
                raise FrameError("expected the endpoint 'infer' or 'reset'")


async def run_until_stopped(server: PolicyServer) -> None:
    """Serve until SIGINT or SIGTERM, then drain."""
    stopped = asyncio.Event()
    with _on_signals(stopped):
        await server.start()
        await stopped.wait()
    await server.stop()


@contextlib.contextmanager
def _on_signals(stopped: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
