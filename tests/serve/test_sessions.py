"""Robots on one server: each as if alone, and none leaves anything behind."""

import gc
import threading
import time
from pathlib import Path

import miniature
import numpy as np
import pytest
from serve.serving import (
    SECONDS,
    Stalling,
    ask,
    descriptors,
    dying_link,
    get,
    observations,
    open_client,
    serving,
    serving_process,
    stalling_observation,
    vanish,
)
from torture import cases
from vqbet_bench.serving import pss_mb
from vqbet_serve.frames import array, pack, unpack
from vqbet_serve.keys import Keys
from vqbet_serve.sessions import derived_seed
from websockets.exceptions import ConnectionClosed

from vqbet_edge import EdgePolicy


def alone(policy: EdgePolicy, seed: int, seen: list[dict[str, np.ndarray]]) -> list[bytes]:
    with policy.sibling(seed=seed) as robot:
        return [robot.act(each).tobytes() for each in seen]


def test_robots_that_join_and_leave_at_random_act_as_if_alone(policy: EdgePolicy) -> None:
    """One thread, so that their requests interleave in every order; each checked bitwise."""
    random = np.random.default_rng(11)
    with serving(policy, seed=5, max_robots=8) as server:
        robots: dict[str, tuple] = {}
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


def test_robots_in_threads_act_as_if_alone(policy: EdgePolicy) -> None:
    count, steps = 6, 40
    expected = [
        alone(policy, derived_seed(0, str(i)), observations(i, steps)) for i in range(count)
    ]
    acted: list[list[bytes]] = [[] for _ in range(count)]

    def drive(number: int, url: str) -> None:
        with open_client(url) as client:
            for seen in observations(number, steps):
                action = ask(client, {**seen, "session_id": str(number)})
                acted[number].append(action if isinstance(action, str) else action.tobytes())  # type: ignore[arg-type]

    with serving(policy) as server:
        threads = [threading.Thread(target=drive, args=(i, server.url)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert acted == expected


def test_many_sessions_on_one_connection(policy: EdgePolicy) -> None:
    names = [None, "a", "b"]
    seeds = [3, derived_seed(3, "a"), derived_seed(3, "b")]
    expected = [alone(policy, seed, observations(9, 20)) for seed in seeds]
    assert len({tuple(each) for each in expected}) == 3
    with serving(policy, seed=3) as server, open_client(server.url) as client:
        for step, seen in enumerate(observations(9, 20)):
            for name, actions in zip(names, expected, strict=True):
                action = ask(client, {**seen, "session_id": name})
                assert isinstance(action, np.ndarray)
                assert action.tobytes() == actions[step]


def test_requests_that_do_not_wait_for_answers_are_answered_in_order(policy: EdgePolicy) -> None:
    count = cases(100, 2000)
    with serving(policy) as server, policy.sibling() as local, open_client(server.url) as client:
        for seen in observations(3, count):
            client.send(pack(seen))
        for seen in observations(3, count):
            actions = array("actions", unpack(client.recv(SECONDS))["actions"])
            assert actions[0].tobytes() == local.act(seen).tobytes()


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_reset_with_a_seed(policy: EdgePolicy, seed: int) -> None:
    seen = observations(8, 12)
    expected = alone(policy, seed, seen)
    with serving(policy, seed=1) as server, open_client(server.url) as client:
        for _ in range(2):
            client.send(pack({"endpoint": "reset", "seed": seed}))
            assert client.recv(SECONDS) == "reset successful"
            acted = [ask(client, each) for each in seen]
            assert [np.asarray(action).tobytes() for action in acted] == expected


def test_an_observation_that_does_not_fit_leaves_the_history(policy: EdgePolicy) -> None:
    seen = observations(2, 20)
    expected = alone(policy, 0, seen)
    bad = [
        {miniature.IMAGE: seen[0][miniature.IMAGE]},
        seen[0] | {miniature.STATE: np.array([np.nan, 1], np.float32)},
        seen[0] | {miniature.STATE: np.zeros(3, np.float32)},
        seen[0] | {miniature.IMAGE: seen[0][miniature.IMAGE].astype(np.float64)},
        seen[0] | {miniature.IMAGE: "image"},
    ]
    with serving(policy) as server, open_client(server.url) as client:
        for each, actions in zip(seen, expected, strict=True):
            for wrong in bad:
                answer = ask(client, wrong)
                assert isinstance(answer, str)
                assert answer.startswith("ObservationError: '")
            action = ask(client, each)
            assert isinstance(action, np.ndarray)
            assert action.tobytes() == actions
        assert 'refusals_total{reason="ObservationError"} 100' in get(server.url, "/metrics")[1]


def test_more_robots_than_allowed_are_refused(policy: EdgePolicy) -> None:
    seen = observations(1, 1)[0]
    with serving(policy, max_robots=2) as server:
        clients = [open_client(server.url) for _ in range(2)]
        for client in clients:
            assert isinstance(ask(client, seen), np.ndarray)
        with open_client(server.url) as third:
            answer = ask(third, seen)
        assert answer == (
            "UsageError: this server drives 2 robots already; end a session, or start it with a "
            "larger --max-robots"
        )
        clients[0].close()
        with open_client(server.url) as third:
            assert isinstance(ask(third, seen), np.ndarray)
        clients[1].close()


def test_a_newer_connection_takes_a_session_over(
    policy: EdgePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own robot's, from the start; the older one, whose link may be dead, is told."""
    seen = observations(1, 7)
    expected = alone(policy, derived_seed(0, "arm"), seen)
    with serving(policy) as server, open_client(server.url) as older:
        for each in seen[:3]:
            ask(older, {**each, "session_id": "arm"})
        with open_client(server.url) as newer:
            acted = [ask(newer, {**each, "session_id": "arm"}) for each in seen]
            assert [np.asarray(action).tobytes() for action in acted] == expected
            assert str(older.recv(SECONDS)).startswith("UsageError: a newer connection has taken")
            with pytest.raises(ConnectionClosed, match="1011"):
                older.recv(SECONDS)
        assert "robot 'unnamed' at 127.0.0.1 was refused: UsageError: a newer" in caplog.text


def test_a_session_whose_link_died_half_open_is_taken_over(policy: EdgePolicy) -> None:
    message = {**observations(1, 1)[0], "session_id": "arm"}
    with serving(policy) as server, dying_link(server.url) as (url, die):
        older = open_client(url)
        assert isinstance(ask(older, message), np.ndarray)
        die()
        with open_client(server.url) as newer:
            assert isinstance(ask(newer, message), np.ndarray)
        vanish(older)


def test_another_robots_session_is_not_taken_over(policy: EdgePolicy) -> None:
    message = {**observations(1, 1)[0], "session_id": "arm"}
    keys = {name: name * 16 for name in ("a", "b")}
    text = "".join(f"{name} {key}\n" for name, key in keys.items())
    headers = {n: {"Authorization": f"Api-Key {key}"} for n, key in keys.items()}
    with (
        serving(policy, keys=Keys(text)) as server,
        open_client(server.url, additional_headers=headers["a"]) as client,
    ):
        assert isinstance(ask(client, message), np.ndarray)
        with open_client(server.url, additional_headers=headers["b"]) as other:
            answer = ask(other, message)
        assert str(answer).startswith("UsageError: this session_id is in use by another")
        assert isinstance(ask(client, message), np.ndarray)


def test_sessions_that_a_connection_has_left_end(policy: EdgePolicy) -> None:
    """As with a client that takes a new id for every episode; but not before it must be."""
    with serving(policy, idle_s=0.1, max_robots=3) as server, open_client(server.url) as client:
        for number in range(9):
            seen = observations(number, 1)[0]
            assert isinstance(ask(client, {**seen, "session_id": str(number)}), np.ndarray)
            assert len(server.sessions) == min(number + 1, 3) or number > 2
            time.sleep(0.2)
        assert len(server.sessions) <= 3


def test_silence_ends_no_connection_until_its_place_is_needed(policy: EdgePolicy) -> None:
    """Then the one that was silent for longest; never one that is being answered."""
    seen, stalling = observations(0, 7), Stalling(policy)
    with (
        serving(stalling, idle_s=0.05, max_robots=3) as server,
        policy.sibling() as local,
        open_client(server.url) as working,
        open_client(server.url) as first,
        open_client(server.url) as second,
    ):
        thread = threading.Thread(target=ask, args=(working, stalling_observation()))
        thread.start()
        assert stalling.stalled.wait(SECONDS)
        for client in (first, second):
            for each in seen[:3]:
                ask(client, each)
        for each in seen[:3]:
            local.act(each)
        time.sleep(0.2)
        action = ask(first, seen[3])  # so it is not the one that was silent for longest
        assert np.asarray(action).tobytes() == local.act(seen[3]).tobytes()
        with open_client(server.url) as newcomer:
            assert isinstance(ask(newcomer, seen[0]), np.ndarray)
            assert "another robot needs the place" in str(second.recv(SECONDS))
            with pytest.raises(ConnectionClosed):
                second.recv(SECONDS)
            action = ask(first, seen[4])
            assert np.asarray(action).tobytes() == local.act(seen[4]).tobytes()
        stalling.go.set()
        thread.join(SECONDS)


def test_silent_connections_leave_their_places_to_others(policy: EdgePolicy) -> None:
    with serving(policy, idle_s=0.05, max_robots=1) as server:
        silent = [open_client(server.url) for _ in range(2)]
        time.sleep(0.2)
        with open_client(server.url) as robot:
            assert isinstance(ask(robot, observations(0, 1)[0]), np.ndarray)
            assert "another robot needs the place" in str(silent[0].recv(SECONDS))
        for client in silent:
            client.close()


def test_a_robot_whose_policy_stalls_holds_nobody_up(policy: EdgePolicy) -> None:
    stalling = Stalling(policy)
    with serving(stalling) as server, open_client(server.url) as stalled:
        with open_client(server.url) as other:
            assert isinstance(ask(other, observations(0, 1)[0]), np.ndarray)
            thread = threading.Thread(target=ask, args=(stalled, stalling_observation()))
            thread.start()
            assert stalling.stalled.wait(SECONDS)
            for seen in observations(1, 20):
                # Pings are answered for the stalled connection too.
                assert stalled.ping().wait(SECONDS)
                assert isinstance(ask(other, seen), np.ndarray)
                assert get(server.url, "/healthz") == (200, "OK\n")
        stalling.go.set()
        thread.join(SECONDS)


def test_nothing_grows_with_robots_that_have_left(policy: EdgePolicy) -> None:
    seen = observations(1, 8)

    def visit(url: str, number: int) -> None:
        client = open_client(url)
        for each in seen:
            ask(client, {**each, "session_id": str(number % 3)})
        client.close() if number % 2 else vanish(client)

    with serving(policy) as server:

        def settled() -> tuple[int, int]:
            end = time.monotonic() + SECONDS
            while len(server.sessions) or server._shared.conversations:
                assert time.monotonic() < end
                time.sleep(0.01)
            gc.collect()
            return descriptors(), threading.active_count()

        for number in range(40):  # the pool's threads start one by one
            visit(server.url, number)
        before = settled()
        for number in range(cases(60, 1000)):
            visit(server.url, number)
        after = settled()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2


def test_memory_grows_by_windows(mini: Path) -> None:
    """A robot adds its buffers, and neither weights nor graphs."""
    graphs = sum(path.stat().st_size for path in mini.iterdir()) / (1 << 20)
    with serving_process(mini, "--max-robots", "40") as (process, url):
        clients, memory = [], []
        for number in range(40):
            clients.append(open_client(url))
            for seen in observations(number, 7):
                assert isinstance(ask(clients[-1], seen), np.ndarray)
            memory.append(pss_mb(process.pid))
        # The first ones start the pool's threads.
        assert (memory[-1] - memory[7]) / 32 < graphs
        for client in clients:
            client.close()


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_pages(policy: EdgePolicy, path: str) -> None:
    with serving(policy) as server, open_client(server.url) as client:
        for seen in observations(1, 3):
            ask(client, seen)
        status, text = get(server.url, path)
        assert status == 200
        if path == "/healthz":
            assert text == "OK\n"
        else:
            assert "vqbet_robots 1\n" in text
            assert "vqbet_step_seconds_count 3\n" in text
            assert 'vqbet_step_seconds_bucket{le="+Inf"} 3\n' in text
