"""Servers for tests, in this process and in one of their own, and what clients of them need."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import miniature
import numpy as np
from vqbet_serve.frames import array, pack, unpack
from vqbet_serve.server import PolicyServer, ServeConfig
from websockets.sync.client import ClientConnection, connect

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.backends.base import Backend

SECONDS = 20.0
COMMAND = [sys.executable, "-c", "from vqbet_serve.cli import main; main()"]


@contextmanager
def serving(
    policy: Any,
    backend: Backend | None = None,
    check: Callable[[], None] = lambda: None,
    **config: Any,
) -> Iterator[PolicyServer]:
    """A server on a thread; when the block ends it is stopped and has nothing left.

    Robots share runs where the policy's backend is given.
    """
    server = PolicyServer(policy, ServeConfig(port=0, **config), backend, check)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(SECONDS)
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(SECONDS)
        assert len(server.sessions) == 0
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SECONDS)
        loop.close()


@contextmanager
def serving_process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its URL."""
    command = [*COMMAND, str(bundle), "--port", "0", "--backend", "onnxruntime", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving on (\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        try:
            yield process, found[1]
        finally:
            process.kill()


def open_client(url: str, **options: Any) -> ClientConnection:
    """A connection that has had its metadata."""
    client = connect(url, compression=None, proxy=None, **options)
    client.recv(SECONDS)
    return client


@contextmanager
def dying_link(url: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A way to a server that can die without a word: where to connect, and what kills it."""
    address, dead = url.removeprefix("ws://").rsplit(":", 1), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as near:
        threads = []

        def forward() -> None:
            robot = near.accept()[0]
            server = socket.create_connection((address[0], int(address[1])), SECONDS)
            for pair in ((robot, server), (server, robot)):
                threads.append(threading.Thread(target=copy, args=pair))
                threads[-1].start()

        def copy(source: socket.socket, sink: socket.socket) -> None:
            with sink, suppress(OSError):  # the other way has ended
                while data := source.recv(1 << 16):
                    if not dead.is_set():
                        sink.sendall(data)

        threads.append(threading.Thread(target=forward))
        threads[-1].start()
        yield f"ws://127.0.0.1:{near.getsockname()[1]}", dead.set
        for thread in threads:
            thread.join(SECONDS)


def ask(
    client: ClientConnection, message: dict[str, Any], seconds: float = SECONDS
) -> np.ndarray | str:
    """A request's action (A,), or the error."""
    client.send(pack(message))
    answer = client.recv(seconds)
    if isinstance(answer, str):
        return answer
    return array("actions", unpack(answer)["actions"])[0]


def vanish(client: ClientConnection) -> None:
    """End a connection as the end of a process does, without a goodbye."""
    with suppress(OSError):  # the server has ended it
        client.socket.shutdown(socket.SHUT_RDWR)


def get(url: str, path: str, **headers: str) -> tuple[int, str]:
    """A page of the server, over HTTP."""
    request = Request(url.replace("ws", "http", 1) + path, headers=headers)  # noqa: S310 - loopback
    with urlopen(request, timeout=SECONDS) as response:  # noqa: S310
        return response.status, response.read().decode()


def observations(seed: int, count: int) -> list[dict[str, np.ndarray]]:
    """What the miniature policy may see."""
    random = np.random.default_rng(seed)
    return [miniature.observation(random) for _ in range(count)]


def descriptors(process: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


class Stalling:
    """A policy, one of whose robots does not come back until `go` is set."""

    def __init__(self, policy: EdgePolicy) -> None:
        self._policy, self.manifest = policy, policy.manifest
        self.go, self.stalled = threading.Event(), threading.Event()

    def sibling(self, *, seed: int) -> Any:
        sibling = self._policy.sibling(seed=seed)
        act = sibling.act

        def stalling(observation: dict[str, np.ndarray]) -> np.ndarray:
            if (observation[miniature.STATE] == miniature.LOW).all():
                self.stalled.set()
                assert self.go.wait(SECONDS)
            return act(observation)

        sibling.act = stalling  # type: ignore[method-assign]
        return sibling


def stalling_observation() -> dict[str, np.ndarray]:
    return {**observations(0, 1)[0], miniature.STATE: miniature.LOW}
