"""Robots on one server: each as if alone, and none leaves anything behind."""

import gc
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from serve.serving import (
    SECONDS,
    STALLING,
    Seen,
    Stalling,
    acts_as,
    ask,
    descriptors,
    get,
    observations,
    open_client,
    serving,
    until,
    vanish,
)
from torture import cases
from vqbet_serve.frames import array, pack, unpack
from vqbet_serve.keys import Keys
from vqbet_serve.server import PolicyServer
from vqbet_serve.sessions import derived_seed
from websockets.exceptions import ConnectionClosed

from vqbet_edge import EdgePolicy

ARM: dict[str, Any] = {**observations(1, 1)[0], "session_id": "arm"}


def alone(policy: EdgePolicy, seed: int, seen: list[Seen]) -> list[bytes]:
    with policy.sibling(seed=seed) as robot:
        return [robot.act(each).tobytes() for each in seen]


def test_robots_that_join_and_leave_at_random_act_as_if_alone(policy: EdgePolicy) -> None:
    """One thread, so that their requests interleave in every order; each checked bitwise."""
    random = np.random.default_rng(11)
    with serving(policy, seed=5, max_robots=8) as server:
        robots: dict[str, tuple[Any, Any]] = {}
        joined, steps = 0, 0
        for _ in range(cases(300, 10_000)):
            if len(robots) < 6 and (not robots or random.random() < 0.15):
                name = f"robot {joined}"
                seen = observations(joined, 40)
                expected = alone(policy, derived_seed(5, name), seen)
                robots[name] = open_client(server.url), iter(zip(seen, expected, strict=True))
                joined += 1
            name = str(random.choice(sorted(robots)))
            client, left = robots[name]
            pair = next(left, None)
            if pair is None or random.random() < 0.03:
                client.close() if random.random() < 0.5 else vanish(client)
                del robots[name]
                continue
            action = ask(client, {**pair[0], "session_id": name})
            assert isinstance(action, np.ndarray), action
            assert action.tobytes() == pair[1]
            steps += 1
        assert joined > 10
        assert steps > 100
        for client, _ in robots.values():
            client.close()


def test_many_sessions_on_one_connection(policy: EdgePolicy) -> None:
    seeds = {None: 3, "a": derived_seed(3, "a"), "b": derived_seed(3, "b")}
    with ExitStack() as stack:
        client = open_client(stack.enter_context(serving(policy, seed=3)).url)
        local = {name: stack.enter_context(policy.sibling(seed=s)) for name, s in seeds.items()}
        for seen in observations(9, 20):
            for name, single in local.items():
                acts_as(single, client, [seen], session_id=name)
        client.close()


def test_requests_that_do_not_wait_for_answers_are_answered_in_order(policy: EdgePolicy) -> None:
    count = cases(100, 2000)
    with serving(policy) as server, policy.sibling() as local, open_client(server.url) as client:
        for seen in observations(3, count):
            client.send(pack(seen))
        for seen in observations(3, count):
            actions = array("actions", unpack(client.recv(SECONDS))["actions"])
            assert actions[0].tobytes() == local.act(seen).tobytes()


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_reset_with_a_seed(policy: EdgePolicy, seed: int) -> None:
    with serving(policy, seed=1) as server, open_client(server.url) as client:
        for _ in range(2):
            client.send(pack({"endpoint": "reset", "seed": seed}))
            assert client.recv(SECONDS) == "reset successful"
            with policy.sibling(seed=seed) as local:
                acts_as(local, client, observations(8, 12))


def test_more_robots_than_allowed_are_refused(policy: EdgePolicy) -> None:
    seen = observations(1, 1)[0]
    with serving(policy, max_robots=1) as server:
        with open_client(server.url) as first:
            assert isinstance(ask(first, seen), np.ndarray)
            with open_client(server.url) as second:
                answer = str(ask(second, seen))
        assert answer.startswith("UsageError: this server drives 1 robots already; end a session")
        with open_client(server.url) as third:
            assert isinstance(ask(third, seen), np.ndarray)


@contextmanager
def dying_link(url: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A way to a server that can die without a word: where to connect, and what kills it."""
    host, port = url.removeprefix("ws://").rsplit(":", 1)
    dead = threading.Event()

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with sink, suppress(OSError):  # the other way has ended
            while data := source.recv(1 << 16):
                if not dead.is_set():
                    sink.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as near, ThreadPoolExecutor(2) as pool:

        def forward() -> None:
            robot, server = near.accept()[0], socket.create_connection((host, int(port)))
            pool.submit(copy, robot, server)
            copy(server, robot)

        pool.submit(forward)
        yield f"ws://127.0.0.1:{near.getsockname()[1]}", dead.set


def test_a_newer_connection_takes_a_session_over(
    policy: EdgePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own robot's, from the start; the older one is told, unless its link has died."""
    with serving(policy) as server, dying_link(server.url) as (url, die):
        older, half_open = open_client(server.url), open_client(url)
        assert isinstance(ask(older, ARM), np.ndarray)
        assert isinstance(ask(half_open, ARM), np.ndarray)
        assert str(older.recv(SECONDS)).startswith("UsageError: a newer connection has taken")
        with pytest.raises(ConnectionClosed, match="1011"):
            older.recv(SECONDS)
        die()
        with (
            open_client(server.url) as newer,
            policy.sibling(seed=derived_seed(0, "arm")) as local,
        ):
            acts_as(local, newer, observations(1, 7), session_id="arm")
        vanish(half_open)
        assert "robot 'unnamed' at 127.0.0.1 was refused: UsageError: a newer" in caplog.text


def test_another_robots_session_is_not_taken_over(policy: EdgePolicy) -> None:
    text = "".join(f"{name} {name * 16}\n" for name in "ab")
    a, b = ({"additional_headers": {"Authorization": f"Api-Key {n * 16}"}} for n in "ab")
    with serving(policy, keys=Keys(text)) as server, open_client(server.url, **a) as client:
        assert isinstance(ask(client, ARM), np.ndarray)
        with open_client(server.url, **b) as other:
            answer = str(ask(other, ARM))
        assert answer.startswith("UsageError: this session_id is in use by another")
        assert isinstance(ask(client, ARM), np.ndarray)


def idle(server: PolicyServer, seconds: float) -> None:
    """Until whoever is not being answered has been silent for so long."""

    def since() -> float:
        found = (each.idle_s for each in server._shared.conversations if each._receiving)
        return min(found, default=0.0)

    until(lambda: since() > seconds)


def test_sessions_that_a_connection_has_left_end(policy: EdgePolicy) -> None:
    """As with a client that takes a new id for every episode; but not before it must be."""
    with serving(policy, idle_s=0.02, max_robots=3) as server, open_client(server.url) as client:
        for number in range(6):
            seen = observations(number, 1)[0]
            assert isinstance(ask(client, {**seen, "session_id": str(number)}), np.ndarray)
            assert len(server.sessions) == min(number + 1, 3) or number > 2
            idle(server, 0.05)
        assert len(server.sessions) <= 3


def test_silence_ends_no_connection_until_its_place_is_needed(policy: EdgePolicy) -> None:
    """Then the one that was silent for longest; never one that is being answered."""
    seen, stalling = observations(0, 5), Stalling(policy)
    with (
        serving(stalling, idle_s=0.05, max_robots=3) as server,
        policy.sibling() as local,
        open_client(server.url) as working,
        open_client(server.url) as first,
        open_client(server.url) as second,
        stalling.held(lambda: ask(working, STALLING)),
    ):
        assert isinstance(ask(second, seen[0]), np.ndarray)
        acts_as(local, first, seen[:3])
        idle(server, 0.1)
        acts_as(local, first, seen[3:4])  # so it is not the one that was silent for longest
        with open_client(server.url) as newcomer:
            assert isinstance(ask(newcomer, seen[0]), np.ndarray)
            assert "another robot needs the place" in str(second.recv(SECONDS))
            with pytest.raises(ConnectionClosed):
                second.recv(SECONDS)
            acts_as(local, first, seen[4:])


def test_a_robot_whose_policy_stalls_holds_nobody_up(policy: EdgePolicy) -> None:
    """Pings are answered for the stalled connection too."""
    stalling = Stalling(policy)
    with (
        serving(stalling) as server,
        open_client(server.url) as stalled,
        open_client(server.url) as other,
        policy.sibling() as local,
        stalling.held(lambda: ask(stalled, STALLING)),
    ):
        for seen in observations(1, cases(20, 2000)):
            assert stalled.ping().wait(SECONDS)
            assert get(server.url, "/healthz") == (200, "OK\n")
            acts_as(local, other, [seen])


def test_nothing_grows_with_robots_that_have_left(policy: EdgePolicy) -> None:
    seen = observations(1, 3)

    def visit(url: str, number: int) -> None:
        client = open_client(url)
        for each in seen:
            ask(client, {**each, "session_id": str(number % 3)})
        client.close() if number % 2 else vanish(client)

    with serving(policy) as server:

        def settled(robots: int) -> tuple[int, int]:
            for number in range(robots):
                visit(server.url, number)
            until(lambda: not len(server.sessions) and not server._shared.conversations)
            gc.collect()
            return descriptors(), threading.active_count()

        before = settled(40)  # the pool's threads start one by one
        after = settled(cases(40, 1000))
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2
