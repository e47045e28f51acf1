"""A fleet on Ray Serve: connections and windows in one deployment, batched weights in another.

    ray start --head --include-dashboard=false --disable-usage-stats
    python integrations/serve/ray_app.py pusht-fp32.bundle --replicas 2

starts it. Called again with another bundle, it rolls that out: new episodes act with the new one,
those that have begun end with the one that they began with. Robots stay connected.

Every bundle is an application of its own, `policy-1`, `policy-2` and so on, with as many replicas
as wanted; the application `robots` speaks vqbet-serve's protocol and asks the newest one.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import tyro
from fastapi import FastAPI, Response, WebSocket
from fastapi import Request as HttpRequest
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.datastructures import Headers
from vqbet_serve.asgi import AsgiConnection
from vqbet_serve.cli import Options
from vqbet_serve.conversation import Conversation, Shared
from vqbet_serve.keys import UNNAMED
from vqbet_serve.metadata import PolicyMetadata
from vqbet_serve.metrics import CONTENT_TYPE, Metrics
from vqbet_serve.readiness import Readiness, ReferenceStep
from vqbet_serve.remote_graphs import GraphRunner, RemoteBackend, Reply, Request
from vqbet_serve.sessions import Sessions

from vqbet_edge import BackendError, EdgePolicy, UsageError, VQBeTEdgeError, cli
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.hub import pinned

ROBOTS, POLICY = "robots", "policy-"
# A robot whose step takes longer has stopped long before.
_PATIENCE_S, _PAUSE_S = 10.0, 0.05
# How soon connections notice a new bundle.
_LOOK_S = 1.0
_LOG = logging.getLogger("ray.serve")
_app = FastAPI(openapi_url=None)


@serve.deployment
class Policy:
    """A replica: weights, and no robot's history."""

    def __init__(self, bundle: str, backend: BackendName, wait_s: float) -> None:
        opened = Bundle.open(bundle)
        self._bundle, self._graphs = bundle, GraphRunner(opened, backend)
        here = EdgePolicy(opened, RemoteBackend(opened.manifest, self._graphs.answer))
        self._readiness = Readiness(ReferenceStep(here, opened))
        self._answer.set_max_batch_size(self._graphs.most)
        self._answer.set_batch_wait_timeout_s(wait_s)

    def bundle(self) -> str:
        """Where the weights came from."""
        return self._bundle

    async def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that does not act.

        Raises:
            BackendError: a reference step fails.
        """
        if failure := await self._readiness.failure():
            raise BackendError(failure)

    async def answer(self, request: Request) -> Reply:
        """Compute one robot's request, in a batch with others'.

        Raises:
            VQBeTEdgeError: it cannot be computed; the others are not concerned.
        """
        reply: Reply | Exception = await self._answer(request)
        if isinstance(reply, Exception):
            raise reply
        return reply

    @serve.batch
    async def _answer(self, requests: list[Request]) -> list[Any]:
        return await asyncio.get_running_loop().run_in_executor(None, self._graphs.run, requests)


@dataclass(frozen=True)
class _Version:
    """A policy of the fleet as its connections see it."""

    number: int
    policy: EdgePolicy
    metadata: PolicyMetadata
    readiness: Readiness

    @classmethod
    def of(cls, number: int) -> "_Version":
        """Ask an application which bundle it has."""
        handle = serve.get_app_handle(f"{POLICY}{number}")
        bundle = Bundle.open(handle.bundle.remote().result(timeout_s=_PATIENCE_S))
        backend = RemoteBackend(bundle.manifest, lambda request: _ask(handle, request))
        policy = EdgePolicy(bundle, backend)
        readiness = Readiness(ReferenceStep(policy, bundle))
        return cls(number, policy, PolicyMetadata.of(bundle.manifest), readiness)


def _ask(handle: Any, request: Request) -> Reply:  # noqa: ANN401
    """Ask any replica; when it is lost, another one: a request holds all that it needs."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            reply: Reply = handle.answer.remote(request).result(timeout_s=_PATIENCE_S)
        except RayTaskError as error:  # noqa: PERF203
            raise own_error(error) from error
        except (RayActorError, RayServeException, TimeoutError) as error:
            if time.monotonic() > end:
                raise BackendError("no replica of the policy answers") from error
            time.sleep(_PAUSE_S)
        else:
            return reply


def own_error(error: RayTaskError) -> VQBeTEdgeError:
    """Our error that a replica raised: Ray's text has a traceback, a process and an address."""
    cause = error.cause
    if type(cause).__module__ == VQBeTEdgeError.__module__:
        return type(cause)(*cause.args)
    return BackendError("a replica of the policy failed")


# Serve makes a copy of the class below where it stands: all that it uses comes before it.
def _policies() -> tuple[list[int], list[int]]:
    """Every policy's number, the newest last, and of those that run.

    An application's status does not tell: while a lost replica starts anew it is not `RUNNING`.
    """
    found = {
        int(number): any(each.replica_states.get("RUNNING") for each in app.deployments.values())
        for name, app in serve.status().applications.items()
        if name.startswith(POLICY) and (number := name.removeprefix(POLICY)).isdigit()
    }
    return sorted(found), sorted(number for number, runs in found.items() if runs)


def _misfit(now: PolicyMetadata, then: PolicyMetadata) -> str:
    """Why robots that know one policy cannot be driven by another; empty if they can."""
    for name in ("observation", "action_dim", "n_obs_steps"):
        if getattr(now, name) != getattr(then, name):
            return f"expected {name} {getattr(now, name)}, got {getattr(then, name)}"
    return ""


@serve.deployment
@serve.ingress(_app)
class Robots:
    """Connections, and every robot's window, queue, random sequence and guards."""

    def __init__(self, arguments: "Arguments") -> None:
        config = self._config = arguments.config()
        pool = ThreadPoolExecutor(config.max_robots, "vqbet-robots")
        # Serve refuses to wait on the thread that it makes replicas on.
        self._version = pool.submit(lambda: _Version.of(_policies()[1][-1])).result()
        fps = self._version.metadata.fps
        self._metrics = Metrics(None if fps is None else 1 / fps)
        self._sessions = Sessions(self._version.policy, config.seed, config.max_robots)
        greeting = self._version.metadata.to_frame()
        self._shared = Shared(self._sessions, self._metrics, pool, greeting, config.idle_s)
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        """Take the newest policy, for episodes that begin."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._look)
            except Exception:  # noqa: BLE001 - Serve's controller may be starting anew
                _LOG.exception("cannot look for a new policy; trying again")

    def _look(self) -> None:
        # Never an older one, also when all of the newest one's replicas are lost.
        _, running = _policies()
        if max(running, default=0) <= self._version.number:
            return
        newest = _Version.of(running[-1])
        if misfit := _misfit(self._version.metadata, newest.metadata):
            _LOG.error("%s%d is not taken: %s", POLICY, newest.number, misfit)
            return
        self._version, self._sessions.policy = newest, newest.policy
        _LOG.info("new episodes act with %s%d", POLICY, newest.number)

    @_app.get("/healthz")
    def healthz(self) -> Response:
        """Whether connections are taken."""
        return Response("OK\n", media_type="text/plain")

    @_app.get("/readyz")
    async def readyz(self) -> Response:
        """Whether the newest policy acts."""
        failure = await self._version.readiness.failure()
        text = f"{failure or 'OK'}\n"
        return Response(text, 503 if failure else 200, media_type="text/plain")

    @_app.get("/metrics")
    def metrics(self, request: HttpRequest) -> Response:
        """Of this replica."""
        if self._robot(request.headers) is None:
            return Response("expected a valid Api-Key\n", 401, media_type="text/plain")
        text = self._metrics.text(len(self._sessions), self._shared.idle_by_robot())
        return Response(text, media_type=CONTENT_TYPE)

    @_app.websocket("/")
    async def drive(self, websocket: WebSocket) -> None:
        """One connection; see `vqbet_serve.server`."""
        robot = self._robot(websocket.headers)
        if reason := self._refusal(websocket, robot):
            self._metrics.refusal(reason)
            await websocket.close(1008)
            return
        await websocket.accept()
        connection = AsgiConnection(websocket, self._version.metadata.largest_frame)
        admitted = lambda: self._robot(websocket.headers) == robot  # noqa: E731
        await Conversation(connection, self._shared, str(robot), admitted).run()

    def _robot(self, headers: Headers) -> str | None:
        """Whose key the headers hold; None: nobody's."""
        if self._config.keys is None:
            return UNNAMED
        given = [value.encode("latin-1") for value in headers.getlist("authorization")]
        return self._config.keys.robot(given)

    def _refusal(self, websocket: WebSocket, robot: str | None) -> str:
        """Why a connection is refused; empty if it is not."""
        if "origin" in websocket.headers:
            return "Origin"
        if robot is None:
            return "Unauthorized"
        is_full = len(self._shared.conversations) >= 2 * self._config.max_robots
        return "TooManyConnections" if is_full and not self._shared.let_one_go() else ""


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Drive a fleet with a bundle, or roll out another one, where address and port stay.

    `max_robots` is per ingress replica.
    """

    # Processes with the weights, and processes with connections.
    replicas: int = 2
    ingress_replicas: int = 1
    # Processors that Ray reserves for each of them.
    replica_cpus: float = 1.0
    ingress_cpus: float = 0.5
    max_robots: int = 64
    backend: BackendName = "onnxruntime"


def roll_out(arguments: Arguments) -> str:
    """Start the fleet with a bundle, or exchange its bundle; the name of its application.

    The policy before the one that is exchanged ends: an episode outlives one exchange, not two.

    Raises:
        UsageError: the robots cannot be driven by it; nothing was changed.
    """
    config = arguments.config()
    bundle = Bundle.open(arguments.bundle)
    metadata = PolicyMetadata.of(bundle.manifest)
    serve.start(http_options={"host": config.host, "port": config.port})
    before, running = _policies()
    if running and (misfit := _misfit(_Version.of(running[-1]).metadata, metadata)):
        raise UsageError(f"'{arguments.bundle}' does not fit the fleet's robots: {misfit}")
    name = f"{POLICY}{max(before, default=0) + 1}"
    policy = Policy.options(
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.replica_cpus},
        max_ongoing_requests=2 * config.max_robots,
    )
    bound = policy.bind(
        pinned(arguments.bundle, bundle.path), arguments.backend, arguments.batch_wait_ms / 1e3
    )
    serve.run(bound, name=name, route_prefix=None)
    if ROBOTS not in serve.status().applications:
        robots = Robots.options(
            num_replicas=arguments.ingress_replicas,
            ray_actor_options={"num_cpus": arguments.ingress_cpus},
            max_ongoing_requests=2 * config.max_robots + 8,
        )
        serve.run(robots.bind(arguments), name=ROBOTS, route_prefix="/")
    for old in before:
        if old < max(running, default=0):
            serve.delete(f"{POLICY}{old}")
    return name


def _main() -> None:
    arguments = tyro.cli(Arguments, prog="ray_app.py")
    ray.init(address="auto")
    _LOG.info("%s is served", roll_out(arguments))


if __name__ == "__main__":
    cli.run(_main)
