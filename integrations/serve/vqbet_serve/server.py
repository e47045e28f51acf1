"""The websocket server: openpi's protocol around `EdgePolicy`.

On connecting, the server sends its metadata. Every request is one binary frame with an observation,
every answer one binary frame with `actions` (1, A) and `server_timing`. A text is an error: an
ObservationError leaves the history as it was, and the connection open; any other ends both.
RoboArena's `endpoint` and vllm-omni's `session_id` are understood. The policy wants one observation
per control step (`query: every_step`), for its history advances with each.
"""

import asyncio
import http
import logging
import math
import signal
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge.runtime.backends.base import Backend
from vqbet_serve.batching import Gatherer
from vqbet_serve.conversation import Conversation, Shared
from vqbet_serve.keys import UNNAMED, Keys
from vqbet_serve.metadata import PolicyMetadata
from vqbet_serve.metrics import CONTENT_TYPE, Metrics
from vqbet_serve.readiness import Readiness
from vqbet_serve.recordings import Recordings
from vqbet_serve.sessions import Sessions

_LOG = logging.getLogger(__name__)
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_LONGEST_WAIT_S = 1.0
#: How long a robot waits for others to share a run with.
DEFAULT_WAIT_MS = 2.0
# Threads that wait for others take no time; more than two batches of them gain nothing.
_THREADS = 16
# What may take how long: opening a connection, a peer's goodbye, the last answers after SIGTERM.
_OPEN_S, _CLOSE_S, _DRAIN_S = 10.0, 2.0, 10.0
# How often a peer is asked whether it is there, and how long it may take to answer.
_PING_S = 20.0
# Websockets' own log has a traceback for everybody who opens a connection and says nothing.
_QUIET = logging.getLogger(f"{__name__}.websockets")
_QUIET.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class ServeConfig:
    """How to serve.

    Attributes:
        host, port: where to listen; port 0 takes any free one.
        keys: what clients must send one of; without any only loopback addresses are served.
        tls: certificate and key for wss://.
        seed: start of the random sequence of sessions without an id.
        max_robots: sessions at the same time; there may be twice as many connections.
        idle_s: seconds without a request after which a robot's place may be given to another one;
            and seconds in which a request that has begun must be whole.
        batch_wait_s: how long a robot waits for others to share a run with; 0 runs each alone.
        recordings: of every session; None: nothing is recorded.

    Raises:
        UsageError: a value is out of range, or an open address has no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys | None = None
    tls: ssl.SSLContext | None = None
    seed: int = 0
    max_robots: int = 16
    idle_s: float = 30.0
    batch_wait_s: float = DEFAULT_WAIT_MS / 1e3
    recordings: Recordings | None = None

    def __post_init__(self) -> None:
        if self.host not in _LOOPBACK and self.keys is None:
            raise UsageError(
                f"'{self.host}' can be reached from other machines, and whoever reaches it moves "
                "robots: pass --api-key-file FILE, or listen on 127.0.0.1"
            )
        if self.max_robots < 1 or not 0 < self.idle_s < math.inf or self.seed < 0:
            raise UsageError(
                "expected --max-robots of 1 or more, --idle-s above 0 and --seed of 0 or more, "
                f"got {self.max_robots}, {self.idle_s} and {self.seed}"
            )
        if not 0 <= self.batch_wait_s <= _LONGEST_WAIT_S:
            raise UsageError(
                f"expected --batch-wait-ms in 0..{1e3 * _LONGEST_WAIT_S:g}, got "
                f"{1e3 * self.batch_wait_s:g}"
            )
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"expected --port in 0..65535, got {self.port}")


class PolicyServer:
    """Serves a policy until `stop`.

    Args:
        policy: a loaded policy; robots get its siblings.
        config: how to serve.
        backend: the policy's, if robots may share its runs.
        check: raises where the policy does not act as it should; for `/readyz`.
    """

    def __init__(
        self,
        policy: EdgePolicy,
        config: ServeConfig,
        backend: Backend | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        metadata = PolicyMetadata.of(policy.manifest)
        self._config, self._max_size = config, metadata.largest_frame
        self.metrics = Metrics(None if metadata.fps is None else 1 / metadata.fps)
        self._gatherer: Gatherer | None = None
        if backend is not None and backend.shared_parts and config.batch_wait_s > 0:
            self._gatherer = Gatherer(backend, config.batch_wait_s, self.metrics.run)
        self._pool = ThreadPoolExecutor(
            min(_THREADS, config.max_robots) if self._gatherer else None, "vqbet-serve"
        )
        step = nullcontext if self._gatherer is None else self._gatherer.step
        self.sessions = Sessions(policy, config.seed, config.max_robots, step, config.recordings)
        self._shared = Shared(
            self.sessions, self.metrics, self._pool, metadata.to_frame(), config.idle_s
        )
        self._readiness = Readiness(check)
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        assert self._server is not None  # noqa: S101 - for the type checker
        address = next(iter(self._server.sockets)).getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"{'ws' if self._config.tls is None else 'wss'}://{host}:{address[1]}"

    async def start(self) -> None:
        """Listen."""
        self._server = await serve(
            self._handle,
            self._config.host,
            self._config.port,
            ssl=self._config.tls,
            process_request=self._answer_http,
            # Browsers name one: a web page may not drive robots that this machine can reach.
            origins=[None],
            open_timeout=_OPEN_S,
            close_timeout=_CLOSE_S,
            max_size=self._max_size,
            # A client that only waits, for a person perhaps, answers pings.
            ping_interval=_PING_S,
            ping_timeout=_PING_S,
            # A request and the one behind it: more would be a queue of stale observations.
            max_queue=1,
            compression=None,
            logger=_QUIET,
        )

    async def stop(self) -> None:
        """Refuse what comes, answer what is being computed, close every connection."""
        assert self._server is not None  # noqa: S101 - for the type checker
        self._server.close(close_connections=False)
        for each in self._shared.conversations:
            each.end()
        try:
            await asyncio.wait_for(self._server.wait_closed(), _DRAIN_S)
        except asyncio.TimeoutError:  # not TimeoutError before Python 3.11
            _LOG.warning("some requests took longer than %s s and stay unanswered", _DRAIN_S)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._readiness.close()
        if self._gatherer is not None:
            await asyncio.to_thread(self._gatherer.close)

    async def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Plain HTTP paths and keys; None lets the websocket open."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            failure = await self._readiness.failure()
            status = http.HTTPStatus.SERVICE_UNAVAILABLE if failure else http.HTTPStatus.OK
            return connection.respond(status, f"{failure or 'OK'}\n")
        if self._robot(request.headers) is None:
            self.metrics.refusal("Unauthorized")
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected a valid Api-Key\n")
        if path == "/metrics":
            text = self.metrics.text(len(self.sessions), self._shared.idle_by_robot())
            response = connection.respond(http.HTTPStatus.OK, text)
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        is_full = len(self._shared.conversations) >= 2 * self._config.max_robots
        if is_full and not self._shared.let_one_go():
            self.metrics.refusal("TooManyConnections")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many robots\n")
        return None

    def _robot(self, headers: Headers) -> str | None:
        """Whose key the headers hold; None: nobody's."""
        if self._config.keys is None:
            return UNNAMED
        # Whatever bytes a client sends, websockets hands them over as surrogates.
        given = [each.encode(errors="surrogateescape") for each in headers.get_all("Authorization")]
        return self._config.keys.robot(given)

    async def _handle(self, connection: ServerConnection) -> None:
        """One connection's life; a cancelled one's sessions end with the process."""
        assert connection.request is not None  # noqa: S101 - for the type checker
        headers = connection.request.headers
        if (robot := self._robot(headers)) is not None:  # its key may be gone since it was asked
            holds = lambda: self._robot(headers) == robot  # noqa: E731
            await Conversation(connection, self._shared, robot, holds).run()


async def run_until_stopped(server: PolicyServer) -> None:
    """Serve until SIGINT or SIGTERM, then drain; a second signal does not wait."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        await server.start()
        _LOG.info("serving on %s", server.url)
        await stopped.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    await server.stop()
