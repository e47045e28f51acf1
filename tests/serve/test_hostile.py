"""Whatever comes over the wire: no wrong action, no traceback to the peer, nothing left behind.

`conftest.py` of the whole suite fails a test in which anything is unpickled, and these servers run
in the test's process.
"""

import gc
import pickle
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import miniature
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from serve.serving import (
    SECONDS,
    Seen,
    acts_as,
    ask,
    descriptors,
    get,
    observations,
    open_client,
    serving,
    serving_process,
    until,
    vanish,
)
from torture import cases
from vqbet_serve.frames import array, check_values, pack, text, unpack
from vqbet_serve.keys import Keys
from vqbet_serve.metadata import PolicyMetadata
from vqbet_serve.server import PolicyServer
from websockets.exceptions import ConnectionClosed, InvalidStatus
from workshop import once

from vqbet_edge import BackendError, EdgePolicy, ObservationError, UsageError, VQBeTEdgeError

KEY = "correct-horse-battery"


class RemoteError(ObservationError):
    """As Ray makes one of an error: of the error's class, with a text of its own."""


def mutated(frame: bytes, random: np.random.Generator) -> bytes:
    """One to three changes, most of them outside the pixels."""
    text = bytearray(frame)
    for _ in range(random.integers(1, 4)):
        near_end = int(random.integers(1, 200))
        start = int(random.choice([near_end, len(text) - near_end, random.integers(len(text))]))
        start %= len(text)
        length = int(random.choice([1, 1, 2, 8, 64, 4096]))
        match random.integers(6):
            case 0:
                text[start] ^= 1 << int(random.integers(8))
            case 1:
                text[start : start + length] = random.bytes(length)
            case 2:
                del text[start : start + length]
            case 3:
                text[start:start] = text[start : start + length]
            case 4:
                text[start] = int(random.integers(0x80, 0x100))  # another type
            case _:
                text[start : start + 5] = b"\xdf\x7f\xff\xff\xff"  # a map of two thousand million
        if len(text) < 16:
            break
    return bytes(text)


def independently_decoded(frame: bytes, keys: Iterable[str]) -> Seen:
    message = msgspec.msgpack.decode(frame)
    found = {}
    for key in keys:
        data, dtype, shape = (message[key][part] for part in (b"data", b"dtype", b"shape"))
        found[key] = np.frombuffer(data, dtype).reshape(shape)
    return found


@contextmanager
def unharmed(
    server: PolicyServer, policy: EdgePolicy, steps: Sequence[Seen] = ()
) -> Iterator[None]:
    """A robot acts before, meanwhile and afterwards as if it were alone; nothing else is left."""
    seen = list(steps) or observations(1, 7)
    key = {"Authorization": f"Api-Key {KEY}"} if server._config.keys else None
    with policy.sibling() as alone, open_client(server.url, additional_headers=key) as robot:
        acts_as(alone, robot, seen)
        before = descriptors(), threading.active_count()
        yield
        acts_as(alone, robot, seen)
        until(lambda: len(server._shared.conversations) == 1 == len(server.sessions))
        gc.collect()
        assert descriptors() <= before[0] + 2
        # The pool's threads start one by one, up to their number.
        assert threading.active_count() <= before[1] + server._pool._max_workers
        assert "InternalError" not in server.metrics.text(0, {})


def no_traceback(answer: str) -> None:
    assert "Traceback" not in answer
    assert "File " not in answer
    assert answer.partition(": ")[0] in {"ObservationError", "UsageError"}


@pytest.mark.parametrize(
    "large", [False, pytest.param(True, marks=pytest.mark.extended)], ids=["24x24", "2 of 720p"]
)
def test_mutated_frames(mini: Path, shared: Path, large: bool) -> None:
    """Also of real cameras' size: what costs more than it should does so there."""
    seen, path, count = observations(0, 50), mini, cases(1000, 100_000)
    if large:
        keys = miniature.IMAGE, "observation.images.wrist"
        path, count = shared / "two-720p.bundle", cases(40, 100_000)
        once(path, lambda: miniature.write(path, miniature.checkpoint((720, 1280), cameras=keys)))
        frame = np.random.default_rng(24).integers(0, 256, (720, 1280, 3), np.uint8)
        seen = [each | dict.fromkeys(keys, frame) for each in seen[:5]]
    with EdgePolicy.load(path, "onnxruntime") as policy:
        outcomes = mutate(policy, seen, count)
    assert outcomes["acted"] > count / 40
    assert outcomes["refused"] > count / 4


def mutate(policy: EdgePolicy, seen: Sequence[Seen], count: int) -> Counter[str]:
    """So many mutated frames beside a robot that acts: each acts rightly or is refused."""
    random, outcomes = np.random.default_rng(21), Counter[str]()
    frames = [pack(each) for each in seen]
    with serving(policy) as server, unharmed(server, policy, seen[:5]), policy.sibling() as local:
        client = None
        for case in range(count):
            frame = mutated(frames[case % len(frames)], random)
            if client is None:
                client = open_client(server.url)
                local.reset(seed=0)
            try:
                client.send(frame)
                answer = client.recv(SECONDS)
            except ConnectionClosed:
                assert client.close_code == 1009  # it had grown beyond the limit
                client = None
                continue
            if isinstance(answer, str):
                no_traceback(answer)
                outcomes["refused"] += 1
                if not answer.startswith("ObservationError"):
                    with pytest.raises(ConnectionClosed):
                        client.recv(SECONDS)
                    client = None
            else:
                action = array("actions", unpack(answer)["actions"])[0]
                expected = local.act(independently_decoded(frame, seen[0]))
                assert action.tobytes() == expected.tobytes()
                outcomes["acted"] += 1
        if client is not None:
            client.close()
    return outcomes


def test_mutated_frames_without_a_network() -> None:
    random = np.random.default_rng(22)
    frame = pack({**observations(0, 1)[0], "session_id": "arm", "endpoint": "infer", "n": [1, {}]})
    metadata = PolicyMetadata("vqbet", "s", "c", {}, 2, 1, 5, 5, "every_step").to_frame()
    read = Counter[str]()
    for _ in range(cases(2000, 1_000_000)):
        with suppress(VQBeTEdgeError):
            for key, value in unpack(mutated(frame, random)).items():
                assert array(key, value).nbytes <= len(frame) * 2
                read["array"] += 1
        with suppress(VQBeTEdgeError):
            PolicyMetadata.from_frame(mutated(metadata, random))
            read["metadata"] += 1
    assert read["array"] > 100
    assert read["metadata"] > 10


def part(**changes: Any) -> dict[bytes, Any]:
    state = observations(0, 1)[0][miniature.STATE]
    whole = {"__ndarray__": True, "data": state.tobytes(), "dtype": "<f4", "shape": [2]}
    return {key.encode(): value for key, value in (whole | changes).items()}


# One of a kind: `test_mutated_frames` has the rest.
NO_ARRAYS = [
    part(dtype="|O", data=pickle.dumps(object)),
    part(dtype="<M8[s]", shape=[1]),
    part(dtype="<f4,<f4", shape=[1]),
    part(dtype=["<f4"]),
    part(shape=[2, 1 << 62]),
    part(shape=[-1, -2]),
    part(shape=[0, 1 << 40, 1 << 40], data=b""),
    part(shape=[1] * 64),
    part(shape=[True, 2]),
    part(data=[0] * 8),
    part(data=b""),
    part(__ndarray__=False),
    {b"__npgeneric__": True, b"data": 1.0, b"dtype": "<f4"},
    {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2], b"data": b"\0" * 8},
    {b"nd": True, b"type": "<f4", b"kind": b"O", b"shape": [2], b"data": b"\0" * 8},
    {(1,): 2},
    1.0,
    msgspec.msgpack.Ext(5, b"\0" * 8),
    pickle.dumps(np.zeros(2, np.float32)),
]


def test_arrays_that_are_none(policy: EdgePolicy, caplog: pytest.LogCaptureFixture) -> None:
    good = observations(0, 1)[0]
    image = msgspec.msgpack.decode(pack(good))[miniature.IMAGE]
    wrong = [{}, *({miniature.STATE: state} for state in NO_ARRAYS)]
    with serving(policy) as server, unharmed(server, policy), open_client(server.url) as client:
        for state in wrong:
            client.send(msgspec.msgpack.encode({miniature.IMAGE: image, **state}))
            answer = str(client.recv(SECONDS))
            no_traceback(answer)
            assert answer.startswith("ObservationError: 'observation.state'"), state
        assert isinstance(ask(client, good), np.ndarray)
    # Of one kind the log has one.
    assert caplog.text.count("ObservationError: 'observation.state'") == 1


NO_REQUESTS = {
    "expected binary frames, got text": ["text"],
    "expected a MessagePack map": [
        b"",
        pickle.dumps({"a": 1}),
        b"\x81\xa1a" + b"\x91" * 4000 + b"\x01",
        b"\x81\xa1\xff\xa1\xff",
        msgspec.msgpack.encode([1, 2]),
    ],
    "expected at most 4096 keys and values": [b"\xdf\x7f\xff\xff\xff"],
    "expected the endpoint": [pack({"endpoint": "close"})],
    "'endpoint': expected a text": [pack({"endpoint": 5})],
    "'session_id': expected 1 to 256 char": [
        pack({"session_id": name}) for name in ("", "x" * 257)
    ],
    "'seed': expected a whole": [pack({"endpoint": "reset", "seed": seed}) for seed in (-1, "1")],
}


@pytest.mark.parametrize("error", NO_REQUESTS)
def test_frames_that_are_no_requests(policy: EdgePolicy, error: str) -> None:
    with serving(policy) as server, unharmed(server, policy):
        for frame in NO_REQUESTS[error]:
            with open_client(server.url) as client:
                client.send(frame)
                answer = str(client.recv(SECONDS))
                assert answer.startswith(f"UsageError: {error}"), frame
                no_traceback(answer)
                with pytest.raises(ConnectionClosed) as closed:
                    client.recv(SECONDS)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1011


MANY = 1_000_000
LONG = b"\xdb" + MANY.to_bytes(4, "big")


# Keys, other keys, items, lists in one another, lists of many, extensions.
TOO_MANY = [
    b"\xdf" + MANY.to_bytes(4, "big") + b"\xa1a\xc0" * MANY,
    b"\xdf" + MANY.to_bytes(4, "big") + b"".join(b"\xa4%04x\xc0" % i for i in range(1 << 16)),
    b"\x81\xa1a\xdd" + MANY.to_bytes(4, "big") + b"\xc0" * MANY,
    b"\x81\xa1a" + b"\xdc\x04\x00" * (MANY // 4),
    b"\x81\xa1a\x9f" + (b"\xdc\xff\xff" + b"\x90" * 0xFFFF) * 15,
    b"\x81\xa1a\xdf" + MANY.to_bytes(4, "big") + b"\xd4\x05a\xc0" * MANY,
]


@contextmanager
def frugal() -> Iterator[None]:
    """Within 64 KiB."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_frames_of_too_many_values(policy: EdgePolicy) -> None:
    """Their headers say so: nothing of them is built, in requests, answers and metadata."""
    with serving(policy) as server, unharmed(server, policy):
        for frame in TOO_MANY:
            for read in (unpack, PolicyMetadata.from_frame):
                with frugal(), pytest.raises(UsageError, match="at most 4096 keys and values"):
                    read(frame)
            with open_client(server.url) as client:
                client.send(frame)
                assert str(client.recv(SECONDS)).startswith("UsageError: expected at most 4096 key")


def values(value: Any) -> int:
    """How many there are, keys included, as msgspec sees them."""
    if isinstance(value, dict):
        return 1 + sum(values(key) + values(child) for key, child in value.items())
    return 1 + (sum(map(values, value)) if isinstance(value, list) else 0)


SIZES = strategies.sampled_from([0, 1, 2, 3, 4, 8, 16, 31, 32, 255, 256, 1 << 16])
SHORT = strategies.sampled_from([0, 15, 16])


@given(
    strategies.recursive(
        strategies.none()
        | strategies.booleans()
        | strategies.integers(-(2**63), 2**64 - 1)
        | strategies.floats()
        | SIZES.map(lambda size: "t" * size)
        | SIZES.map(bytes)
        | SHORT.map(lambda size: [None] * size)
        | strategies.just([None] * (1 << 16))
        | SIZES.map(lambda size: msgspec.msgpack.Ext(5, bytes(size))),
        lambda inner: (
            strategies.lists(inner, max_size=20)
            | strategies.dictionaries(strategies.text(), inner, max_size=20)
        ),
    )
)
@settings(max_examples=cases(60, 10_000), deadline=None, database=None)
def test_values_are_counted(value: Any) -> None:
    frame, count = msgspec.msgpack.encode(value), values(value)
    with mock.patch("vqbet_serve.frames._MOST_VALUES", count):
        check_values(frame)
    with mock.patch("vqbet_serve.frames._MOST_VALUES", max(1, count - 1)):
        if count > 1:
            with pytest.raises(UsageError):
                check_values(frame)


@pytest.mark.parametrize("name", ["session_id", "endpoint"])
def test_a_long_text_is_not_read(name: str) -> None:
    message = {name: msgspec.Raw(LONG + b"x" * MANY)}
    expected = f"'{name}': expected 1 to 256 characters, got 1000005"
    with frugal(), pytest.raises(UsageError, match=expected):
        text(message, name, 256)


@pytest.mark.parametrize(
    ("came", "words"),
    [
        ({"nd": True, "typ": "<f4", "of": 1}, "got a map with the keys 'nd', 'typ', 'of'"),
        ([1.0, 2.0], "got a list"),
        (b"\xff\xd8\xff\xe0" + bytes(90), "got a JPEG file; decode it on the robot"),
        (np.frombuffer(b"\x89PNG\r\n\x1a\n" + bytes(90), np.uint8), "got a PNG file; decode it"),
    ],
    ids=["map", "list", "JPEG", "PNG"],
)
def test_what_came_instead_of_an_array_is_named(came: Any, words: str) -> None:
    with pytest.raises(ObservationError, match=f"'k': expected an array.*{words}"):
        array("k", unpack(pack({"k": came}))["k"])


def test_arrays_of_another_package_are_read() -> None:
    packed = {"nd": True, "kind": b"", "type": "<f4", "shape": [2], "data": b"\0" * 8}
    for came in (packed, part()):
        assert array("k", unpack(pack({"k": came}))["k"]).shape == (2,)


def test_oversized_frames(policy: EdgePolicy, caplog: pytest.LogCaptureFixture) -> None:
    with serving(policy) as server:
        limit = server._max_size
        assert limit < 40 << 20
        with unharmed(server, policy):
            for message in (bytes(limit + 1), bytes(1 << 26), [bytes(limit // 9)] * 10):
                client = open_client(server.url)
                with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012 - sending, or later
                    client.send(message)
                    client.recv(SECONDS)
                # A peer that is still sending may see no more than the end of the connection.
                assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
        assert f"frame with {limit + 1} bytes exceeds limit of {limit} bytes" in caplog.text
        assert 'refusals_total{reason="MessageTooBig"} 3' in server.metrics.text(0, {})


def test_a_flood_of_empty_fragments(policy: EdgePolicy) -> None:
    with serving(policy) as server, unharmed(server, policy), open_client(server.url) as client:
        with pytest.raises(ConnectionClosed):
            client.send(b"" for _ in range(1_000_000))
        with suppress(ConnectionClosed):
            while True:
                no_traceback(str(client.recv(SECONDS)))


@pytest.mark.parametrize("pause_s", [0.05, None])
def test_slow_writers_and_half_open_connections(
    policy: EdgePolicy, pause_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then, or nothing after a part of a frame: no ping is answered in it."""
    monkeypatch.setattr("vqbet_serve.server._PING_S", 0.3)
    with serving(policy) as server, open_client(server.url) as client:
        ended = threading.Event()

        def write() -> None:
            client.socket.sendall(b"\x82\xfe\x01\x00" + b"mask" + b"\0" * 4)
            while pause_s is not None and not ended.wait(pause_s):
                with suppress(OSError):
                    client.socket.sendall(b"\0")

        writer = threading.Thread(target=write)
        writer.start()
        with pytest.raises(ConnectionClosed, match="ping timeout"):
            client.recv(SECONDS)
        ended.set()
        writer.join(SECONDS)


def test_a_request_that_does_not_become_whole(policy: EdgePolicy) -> None:
    """Fragments now and then: pings are answered between them."""

    def drip() -> Iterator[bytes]:
        for _ in range(60):
            yield b"x"
            time.sleep(0.05)

    with serving(policy, idle_s=0.2) as server, open_client(server.url) as client:
        with pytest.raises(ConnectionClosed):
            client.send(drip())
        assert client.recv(SECONDS) == "UsageError: no whole request within 0.2 s"


def test_wrong_keys(policy: EdgePolicy) -> None:
    right = f"Api-Key {KEY}"
    said = KEY, right + "x", right[:-1], f"Bearer {KEY}", "Api-Key \xff\xfe"
    wrong: list[list[tuple[str, str]]] = [[], *([("Authorization", each)] for each in said)]
    wrong.append([("Authorization", right), ("Authorization", "Api-Key other")])
    with serving(policy, keys=Keys(KEY)) as server, unharmed(server, policy):
        for headers in wrong:
            with pytest.raises(InvalidStatus, match="401"):
                open_client(server.url, additional_headers=headers)
        assert get(server.url, "/healthz") == (200, "OK\n")
        text = get(server.url, "/metrics", Authorization=right)[1]
        assert f'refusals_total{{reason="Unauthorized"}} {len(wrong)}' in text
        with pytest.raises(OSError, match="401"):
            get(server.url, "/metrics")


def test_a_web_page(policy: EdgePolicy) -> None:
    """Any page in a browser can open websockets to loopback; browsers say which page it is."""
    with serving(policy) as server, unharmed(server, policy):
        for origin in ("http://example.com", "null", "http://127.0.0.1"):
            with pytest.raises(InvalidStatus, match="403"):
                open_client(server.url, origin=origin)


def test_more_connections_than_twice_the_robots(policy: EdgePolicy) -> None:
    with serving(policy, max_robots=2) as server:
        clients = [open_client(server.url) for _ in range(4)]
        with pytest.raises(InvalidStatus, match="503"):
            open_client(server.url)
        assert isinstance(ask(clients[0], observations(0, 1)[0]), np.ndarray)
        for client in clients:
            vanish(client)


def test_garbage_instead_of_a_websocket(policy: EdgePolicy) -> None:
    random = np.random.default_rng(23)
    with serving(policy, idle_s=3600) as server, unharmed(server, policy):
        port = int(server.url.rpartition(":")[2])
        for case in range(cases(50, 10_000)):
            with socket.create_connection(("127.0.0.1", port), SECONDS) as raw:
                line = b"GET / HTTP/1.1\r\n" if case % 2 else b""
                raw.sendall(line + random.bytes(int(random.integers(1, 300))) + b"\r\n\r\n")
                raw.shutdown(socket.SHUT_WR)
                answer = b""
                while more := raw.recv(1 << 16):
                    answer += more
                assert b"Traceback" not in answer
        for _ in range(cases(50, 10_000)):
            client = open_client(server.url)
            client.socket.sendall(random.bytes(int(random.integers(1, 3000))))
            vanish(client)


@pytest.mark.extended
def test_a_thousand_connects_without_a_word(mini: Path, policy: EdgePolicy) -> None:
    """Of a process of its own, whose open files are its own too."""
    with (
        serving_process(mini) as (process, url),
        policy.sibling() as alone,
        open_client(url) as robot,
    ):
        address = "127.0.0.1", int(url.rpartition(":")[2])
        acts_as(alone, robot, observations(1, 7))
        before = descriptors(process.pid)
        silent = [socket.create_connection(address, SECONDS) for _ in range(cases(200, 900))]
        acts_as(alone, robot, observations(2, 7))
        for each in silent:
            each.close()
        until(lambda: descriptors(process.pid) <= before)
        acts_as(alone, robot, observations(3, 7))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ZeroDivisionError("a bug of ours"), "InternalError: the server's log"),
        (BackendError("/home/me failed: Traceback"), "BackendError: the server's log tells more"),
        (RemoteError("ray::Policy.answer() (pid=7, ip=10.0.0.9)"), "InternalError: the server's"),
    ],
    ids=["ours", "a library's", "a remote traceback"],
)
def test_what_failed_on_the_server_stays_there(
    policy: EdgePolicy,
    error: Exception,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("vqbet_serve.sessions.Session.act", mock.Mock(side_effect=error))
    with serving(policy) as server, open_client(server.url) as client:
        answer = str(ask(client, observations(0, 1)[0]))
        kind = told.partition(":")[0]
        assert f'reason="{kind}"}} 1' in get(server.url, "/metrics")[1]
    assert answer.startswith(told)
    assert str(error) not in answer
    assert str(error) in caplog.text
