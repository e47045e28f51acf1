"""Servers for tests, in this process and in one of their own, and what clients of them need."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
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
Seen = dict[str, np.ndarray]


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
def serving_process(
    bundle: Path, *options: str, before: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its URL; `before` is run first in there."""
    code = f"{before}\nfrom vqbet_serve.cli import main; main()"
    command = [sys.executable, "-c", code, str(bundle), "--port", "0", "--backend", "onnxruntime"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
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


def ask(client: ClientConnection, message: dict[str, Any]) -> np.ndarray | str:
    """A request's action (A,), or the error."""
    client.send(pack(message))
    answer = client.recv(SECONDS)
    return answer if isinstance(answer, str) else array("a", unpack(answer)["actions"])[0]


def acts_as(alone: EdgePolicy, client: ClientConnection, seen: list[Seen], **more: Any) -> None:
    """Each step's action is bitwise that of a policy alone."""
    for each in seen:
        action = ask(client, {**each, **more})
        assert isinstance(action, np.ndarray), action
        assert action.tobytes() == alone.act(each).tobytes()


def vanish(client: ClientConnection) -> None:
    """End a connection as the end of a process does, without a goodbye."""
    with suppress(OSError):  # the server has ended it
        client.socket.shutdown(socket.SHUT_RDWR)


def get(url: str, path: str, **headers: str) -> tuple[int, str]:
    """A page of the server, over HTTP."""
    request = Request(url.replace("ws", "http", 1) + path, headers=headers)  # noqa: S310 - loopback
    with urlopen(request, timeout=SECONDS) as response:  # noqa: S310
        return response.status, response.read().decode()


def observations(seed: int, count: int) -> list[Seen]:
    """What the miniature policy may see."""
    return miniature.observations(count, seed)


def descriptors(process: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def until(what: Callable[[], Any]) -> None:
    """Wait for it."""
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


STALLING = {**observations(0, 1)[0], miniature.STATE: miniature.LOW}


class Stalling:
    """A policy whose robots do not come back from `STALLING` until `go` is set."""

    def __init__(self, policy: EdgePolicy) -> None:
        self._policy, self.manifest = policy, policy.manifest
        self.go, self.stalled = threading.Event(), threading.Event()

    def sibling(self, *, seed: int) -> Any:
        sibling = self._policy.sibling(seed=seed)
        act = sibling.act

        def stalling(observation: Seen) -> np.ndarray:
            if (observation[miniature.STATE] == miniature.LOW).all():
                self.stalled.set()
                assert self.go.wait(SECONDS)
            return act(observation)

        sibling.act = stalling  # type: ignore[method-assign]
        return sibling

    @contextmanager
    def held(self, act: Callable[[], object]) -> Iterator[None]:
        """`act` hangs on another thread meanwhile, and ends at the end of the block."""
        thread = threading.Thread(target=act)
        thread.start()
        assert self.stalled.wait(SECONDS)
        try:
            yield
        finally:
            self.go.set()
            thread.join(SECONDS)
