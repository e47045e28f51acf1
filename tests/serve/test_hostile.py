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
    ask,
    descriptors,
    get,
    observations,
    open_client,
    serving,
    serving_process,
    vanish,
)
from torture import cases
from vqbet_serve.frames import array, check_values, pack, text, unpack
from vqbet_serve.keys import Keys
from vqbet_serve.metadata import PolicyMetadata
from vqbet_serve.server import PolicyServer
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from workshop import once

from vqbet_edge import BackendError, EdgePolicy, ObservationError, UsageError, VQBeTEdgeError

KEY = "correct-horse-battery"
Seen = dict[str, np.ndarray]


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


def independently_decoded(frame: bytes, keys: Iterable[str]) -> dict[str, np.ndarray]:
    message = msgspec.msgpack.decode(frame)
    return {
        key: np.frombuffer(message[key][b"data"], message[key][b"dtype"]).reshape(
            message[key][b"shape"]
        )
        for key in keys
    }


def act_as(alone: EdgePolicy, robot: ClientConnection, steps: Sequence[Seen] | None = None) -> None:
    """Seven steps of a robot, or others, each bitwise the policy's own."""
    for seen in steps or observations(1, 7):
        action = ask(robot, seen)
        assert isinstance(action, np.ndarray)
        assert action.tobytes() == alone.act(seen).tobytes()


@contextmanager
def unharmed(
    server: PolicyServer, policy: EdgePolicy, steps: Sequence[Seen] | None = None
) -> Iterator[ClientConnection]:
    """A robot acts before, meanwhile and afterwards as if it were alone; nothing else is left."""
    with policy.sibling() as alone, open_client(server.url, **_key(server)) as robot:
        act_as(alone, robot, steps)
        before = descriptors(), threading.active_count()
        yield robot
        act_as(alone, robot, steps)
        end = time.monotonic() + SECONDS
        while len(server._shared.conversations) > 1 or len(server.sessions) > 1:
            assert time.monotonic() < end
            time.sleep(0.01)
        gc.collect()
        # The pool's threads start one by one, up to their number.
        pool = server._pool._max_workers
        assert descriptors() <= before[0] + 2
        assert threading.active_count() <= before[1] + pool
        assert "InternalError" not in server.metrics.text(0, {})


def _key(server: PolicyServer) -> dict[str, Any]:
    return (
        {"additional_headers": {"Authorization": f"Api-Key {KEY}"}} if server._config.keys else {}
    )


def no_traceback(answer: str) -> None:
    assert "Traceback" not in answer
    assert "File " not in answer
    assert answer.partition(": ")[0] in {"ObservationError", "UsageError"}


def test_mutated_frames(policy: EdgePolicy) -> None:
    seen = [observations(case, 1)[0] for case in range(50)]
    outcomes = mutate(policy, seen, cases(3000, 100_000))
    assert outcomes["acted"] > 100
    assert outcomes["refused"] > 1000


def test_mutated_frames_of_two_cameras_of_720p(shared: Path) -> None:
    """Real cameras' frames: what costs more than it should does so here."""
    keys = miniature.IMAGE, "observation.images.wrist"
    path = shared / "two-720p.bundle"
    once(path, lambda: miniature.write(path, miniature.checkpoint((720, 1280), cameras=keys)))
    random, state = np.random.default_rng(24), observations(0, 5)
    seen = [
        each | {key: random.integers(0, 256, (720, 1280, 3), np.uint8) for key in keys}
        for each in state
    ]
    with EdgePolicy.load(path, "onnxruntime") as policy:
        outcomes = mutate(policy, seen, cases(40, 100_000))
    assert outcomes["acted"] > 1
    assert outcomes["refused"] > 10


def mutate(policy: EdgePolicy, seen: Sequence[Seen], count: int) -> Counter[str]:
    """So many mutated frames beside a robot that acts: each acts rightly or is refused."""
    random, outcomes = np.random.default_rng(21), Counter[str]()
    frames = [pack(each) for each in seen]
    beside = serving(policy)
    with beside as server, unharmed(server, policy, seen[:5]), policy.sibling() as local:
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
                continue
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
    for _ in range(cases(20_000, 1_000_000)):
        with suppress(VQBeTEdgeError):
            for key, value in unpack(mutated(frame, random)).items():
                assert array(key, value).nbytes <= len(frame) * 2
                read["array"] += 1
        with suppress(VQBeTEdgeError):
            PolicyMetadata.from_frame(mutated(metadata, random))
            read["metadata"] += 1
    assert read["array"] > 1000
    assert read["metadata"] > 100


def part(**changes: Any) -> dict[bytes, Any]:
    state = observations(0, 1)[0][miniature.STATE]
    whole = {"__ndarray__": True, "data": state.tobytes(), "dtype": "<f4", "shape": [2]}
    return {key.encode(): value for key, value in (whole | changes).items()}


@pytest.mark.parametrize(
    "state",
    [
        part(dtype="|O", data=pickle.dumps(object)),
        part(dtype="|V8"),
        part(dtype="<c8", shape=[1]),
        part(dtype="<M8[s]", shape=[1]),
        part(dtype="U2"),
        part(dtype="<f4,<f4", shape=[1]),
        part(dtype=["<f4"]),
        part(dtype="<f4\0"),
        part(shape=[2, 1 << 62]),
        part(shape=[-1]),
        part(shape=[-1, -2]),
        part(shape=[0, 1 << 40, 1 << 40], data=b""),
        part(shape=[1] * 64),
        part(shape=2),
        part(shape=[2.0]),
        part(shape=[True, 2]),
        part(data="text"),
        part(data=[0] * 8),
        part(data=b""),
        part(__ndarray__=1),
        part(__ndarray__=False),
        {b"__npgeneric__": True, b"data": 1.0, b"dtype": "<f4"},
        {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2], b"data": b"\0" * 8},
        {b"nd": True, b"type": "<f4", b"kind": b"O", b"shape": [2], b"data": b"\0" * 8},
        {b"nd": True, b"type": [["x", "<f4"]], b"kind": b"V", b"shape": [2], b"data": b"\0" * 8},
        {b"nd": False, b"type": "<f4", b"data": b"\0" * 4},
        {1: 2},
        {(1,): 2},
        [1.0, 2.0],
        1.0,
        None,
        msgspec.msgpack.Ext(5, b"\0" * 8),
        pickle.dumps(np.zeros(2, np.float32)),
    ],
    ids=lambda value: type(value).__name__ + str(value)[:40].partition(" at ")[0],
)
def test_arrays_that_are_none(policy: EdgePolicy, state: Any) -> None:
    image = msgspec.msgpack.decode(pack({"i": observations(0, 1)[0][miniature.IMAGE]}))["i"]
    frame = msgspec.msgpack.encode({miniature.IMAGE: image, miniature.STATE: state})
    with serving(policy) as server, open_client(server.url) as client:
        client.send(frame)
        answer = client.recv(SECONDS)
        assert isinstance(answer, str)
        no_traceback(answer)
        assert answer.startswith("ObservationError: 'observation.state'")
        assert isinstance(ask(client, observations(0, 1)[0]), np.ndarray)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        ("text", "expected binary frames, got text"),
        (b"", "expected a MessagePack map"),
        (pickle.dumps({"a": 1}), "expected a MessagePack map"),
        (b"\x81\xa1a" + b"\x91" * 4000 + b"\x01", "expected a MessagePack map"),
        (b"\xdf\x7f\xff\xff\xff", "expected at most 4096 keys and values"),
        (b"\x81\xa1\xff\xa1\xff", "expected a MessagePack map"),
        (msgspec.msgpack.encode([1, 2]), "expected a MessagePack map"),
        (msgspec.msgpack.encode({b"a": 1}), "expected a MessagePack map"),
        (msgspec.msgpack.encode({"endpoint": "close"}), "expected the endpoint"),
        (msgspec.msgpack.encode({"endpoint": 5}), "'endpoint': expected a text"),
        (msgspec.msgpack.encode({"session_id": ""}), "'session_id': expected 1 to 256 char"),
        (msgspec.msgpack.encode({"session_id": "x" * 257}), "'session_id': expected 1 to 256"),
        (msgspec.msgpack.encode({"session_id": ["x"]}), "'session_id': expected a text"),
        (msgspec.msgpack.encode({"endpoint": "reset", "seed": -1}), "'seed': expected a whole"),
        (msgspec.msgpack.encode({"endpoint": "reset", "seed": "1"}), "'seed': expected a whole"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_frames_that_are_no_requests(policy: EdgePolicy, frame: bytes | str, error: str) -> None:
    with serving(policy) as server, unharmed(server, policy), open_client(server.url) as client:
        client.send(frame)
        answer = client.recv(SECONDS)
        assert isinstance(answer, str)
        assert answer.startswith(f"UsageError: {error}")
        no_traceback(answer)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(SECONDS)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011


MANY = 1_000_000
LONG = b"\xdb" + MANY.to_bytes(4, "big")


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdf" + MANY.to_bytes(4, "big") + b"\xa1a\xc0" * MANY,
        b"\xdf" + MANY.to_bytes(4, "big") + b"".join(b"\xa4%04x\xc0" % i for i in range(1 << 16)),
        b"\x81\xa1a\xdd" + MANY.to_bytes(4, "big") + b"\xc0" * MANY,
        b"\x81\xa1a" + b"\xdc\x04\x00" * (MANY // 4),
        b"\x81\xa1a\x9f" + (b"\xdc\xff\xff" + b"\x90" * 0xFFFF) * 15,
        b"\x81\xa1a\xdf" + MANY.to_bytes(4, "big") + b"\xd4\x05a\xc0" * MANY,
    ],
    ids=["keys", "names", "items", "in one another", "of many", "extensions"],
)
def test_frames_of_too_many_values(policy: EdgePolicy, frame: bytes) -> None:
    """Their headers say so: nothing of them is built, in requests, answers and metadata."""
    for read in (unpack, PolicyMetadata.from_frame):
        tracemalloc.start()
        try:
            with pytest.raises(UsageError, match="at most 4096 keys and values"):
                read(frame)
            assert tracemalloc.get_traced_memory()[1] < 1 << 16
        finally:
            tracemalloc.stop()
    with serving(policy) as server, unharmed(server, policy), open_client(server.url) as client:
        client.send(frame)
        assert str(client.recv(SECONDS)).startswith("UsageError: expected at most 4096 keys and")


def values(value: Any) -> int:
    """How many there are, keys included, as msgspec sees them."""
    match value:
        case dict():
            return 1 + sum(values(key) + values(child) for key, child in value.items())
        case list() | tuple():
            return 1 + sum(map(values, value))
        case _:
            return 1


@given(
    strategies.recursive(
        strategies.none()
        | strategies.booleans()
        | strategies.integers(-(2**63), 2**64 - 1)
        | strategies.floats()
        | strategies.sampled_from([0, 31, 32, 255, 256, 1 << 16]).map(lambda n: "t" * n)
        | strategies.sampled_from([0, 255, 256, 1 << 16]).map(bytes)
        | strategies.just([None] * (1 << 16))
        | strategies.sampled_from([0, 1, 2, 3, 4, 8, 16, 255, 1 << 16]).map(
            lambda n: msgspec.msgpack.Ext(5, bytes(n))
        ),
        lambda inner: (
            strategies.lists(inner, max_size=20)
            | strategies.dictionaries(strategies.text(), inner, max_size=20)
        ),
    )
)
@settings(max_examples=cases(100, 10_000), deadline=None, database=None)
def test_values_are_counted(value: Any) -> None:
    frame, count = msgspec.msgpack.encode(value), values(value)
    with mock.patch("vqbet_serve.frames._MOST_VALUES", count):
        check_values(frame)
    with mock.patch("vqbet_serve.frames._MOST_VALUES", max(1, count - 1)):
        if count > 1:
            with pytest.raises(UsageError):
                check_values(frame)


def test_a_long_text_is_not_read(policy: EdgePolicy) -> None:
    del policy
    for name in ("session_id", "endpoint"):
        message = {name: msgspec.Raw(LONG + b"x" * MANY)}
        tracemalloc.start()
        try:
            with pytest.raises(
                UsageError, match=f"'{name}': expected 1 to 256 characters, got 1000005"
            ):
                text(message, name, 256)
            assert tracemalloc.get_traced_memory()[1] < 1 << 16
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("came", "words"),
    [
        (part(), ""),
        ({"nd": True, "kind": b"", "type": "<f4", "shape": [2], "data": b"\0" * 8}, ""),
        ({"nd": True, "typ": "<f4", "of": 1}, "got a map with the keys 'nd', 'typ', 'of'"),
        ([1.0, 2.0], "got a list"),
        (b"\0" * 8, "got bytes"),
        ("AAAA", "got a text"),
        (None, r"got nothing \(nil\)"),
        (1.5, "got a value of the type float"),
        (b"\xff\xd8\xff\xe0" + bytes(90), "got a JPEG file; decode it on the robot"),
        (np.frombuffer(b"\x89PNG\r\n\x1a\n" + bytes(90), np.uint8), "got a PNG file; decode it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_came_instead_of_an_array_is_named(came: Any, words: str) -> None:
    packed = unpack(pack({"k": came}))["k"]
    if not words:
        assert array("k", packed).shape == (2,)
        return
    with pytest.raises(ObservationError, match=f"'k': expected an array.*{words}"):
        array("k", packed)


def test_observations_that_do_not_fit_are_named_as_they_came(
    policy: EdgePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """Cameras that are too large, in whatever layout, and names that nobody looks at."""
    seen = observations(0, 1)[0]
    large = np.zeros((1080, 1920, 3), np.uint8)
    planar = np.zeros((3, 480, 640), np.float32)
    with serving(policy) as server, unharmed(server, policy), open_client(server.url) as client:
        for frame, size in ((large, "1080x1920"), (planar, "480x640")):
            answer = ask(client, seen | {miniature.IMAGE: frame})
            assert str(answer).startswith("ObservationError: 'observation.image': expected uint8")
            assert "was trained on 24x24 (height x width) and resizes nothing" in str(answer)
            assert f"the camera gives {size}: resize its frames, on the robot" in str(answer)
        answer = ask(client, {"image": seen[miniature.IMAGE], "state": seen[miniature.STATE]})
        assert answer == (
            "ObservationError: 'observation.image' is missing: expected ['observation.image', "
            "'observation.state'], got ['image', 'state']"
        )
        assert isinstance(ask(client, seen), np.ndarray)
    # Of one kind the log has one.
    assert caplog.text.count("'observation.image': expected uint8 (24, 24, 3)") == 1


def test_oversized_frames(policy: EdgePolicy, caplog: pytest.LogCaptureFixture) -> None:
    with serving(policy) as server:
        limit = server._max_size
        assert limit < 40 << 20
        with unharmed(server, policy):
            oversize(server.url, limit)
        assert f"frame with {limit + 1} bytes exceeds limit of {limit} bytes" in caplog.text
        assert 'refusals_total{reason="MessageTooBig"} 3' in server.metrics.text(0, {})


def oversize(url: str, limit: int) -> None:
    for size, fragments in [(limit + 1, 1), (1 << 26, 1), (limit + 100, 10)]:
        client = open_client(url)
        step = -(-size // fragments)
        with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012 - while it is sent or later
            pieces = [b"\0" * step] * fragments
            client.send(pieces if fragments > 1 else pieces[0])
            client.recv(SECONDS)
        # A peer that is still sending may see no more than the end of the connection.
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


def test_a_flood_of_empty_fragments(policy: EdgePolicy) -> None:
    with serving(policy) as server, unharmed(server, policy), open_client(server.url) as client:
        with pytest.raises(ConnectionClosed):
            client.send(b"" for _ in range(1_000_000))
        with suppress(ConnectionClosed):
            while True:
                no_traceback(str(client.recv(SECONDS)))


@pytest.mark.parametrize("bytes_per_s", [20, 0])
def test_slow_writers_and_half_open_connections(
    policy: EdgePolicy, bytes_per_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then, or nothing after a part of a frame: no ping is answered in it."""
    frame = b"\x82\xfe\x01\x00" + b"mask" + b"\0" * 256

    def write(client: ClientConnection, ended: threading.Event) -> None:
        client.socket.sendall(frame[:12])
        for byte in frame[12:] if bytes_per_s else b"":
            if ended.wait(1 / bytes_per_s):
                return
            with suppress(OSError):
                client.socket.sendall(bytes([byte]))

    monkeypatch.setattr("vqbet_serve.server._PING_S", 0.3)
    with serving(policy) as server, open_client(server.url) as client:
        ended = threading.Event()
        writer = threading.Thread(target=write, args=(client, ended))
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
            time.sleep(0.1)

    with serving(policy, idle_s=0.3) as server, open_client(server.url) as client:
        with pytest.raises(ConnectionClosed):
            client.send(drip())
        assert client.recv(SECONDS) == "UsageError: no whole request within 0.3 s"


def test_wrong_keys(policy: EdgePolicy) -> None:
    wrong: list[dict[str, str] | list[tuple[str, str]]] = [
        {},
        {"Authorization": ""},
        {"Authorization": KEY},
        {"Authorization": f"Api-Key {KEY}x"},
        {"Authorization": f"Api-Key {KEY[:-1]}"},
        {"Authorization": f"api-key {KEY}"},
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": "Api-Key \xff\xfe"},
        [("Authorization", f"Api-Key {KEY}"), ("Authorization", "Api-Key other")],
    ]
    with serving(policy, keys=Keys(KEY)) as server, unharmed(server, policy):
        for headers in wrong:
            with pytest.raises(InvalidStatus, match="401"):
                open_client(server.url, additional_headers=headers)
        assert get(server.url, "/healthz") == (200, "OK\n")
        text = get(server.url, "/metrics", Authorization=f"Api-Key {KEY}")[1]
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
        for case in range(cases(200, 10_000)):
            with socket.create_connection(("127.0.0.1", port), SECONDS) as raw:
                line = b"GET / HTTP/1.1\r\n" if case % 2 else b""
                raw.sendall(line + random.bytes(int(random.integers(1, 300))) + b"\r\n\r\n")
                raw.shutdown(socket.SHUT_WR)
                answer = b""
                while more := raw.recv(1 << 16):
                    answer += more
                assert b"Traceback" not in answer
        for _ in range(cases(200, 10_000)):
            client = open_client(server.url)
            client.socket.sendall(random.bytes(int(random.integers(1, 3000))))
            vanish(client)


def test_a_thousand_connects_without_a_word(mini: Any, policy: EdgePolicy) -> None:
    """Of a process of its own, whose open files are its own too."""
    with serving_process(mini) as (process, url), policy.sibling() as alone:
        port = int(url.rpartition(":")[2])
        robot = open_client(url)

        act_as(alone, robot)
        before = descriptors(process.pid)
        silent = [
            socket.create_connection(("127.0.0.1", port), SECONDS) for _ in range(cases(200, 900))
        ]
        act_as(alone, robot)
        for each in silent:
            each.close()
        end = time.monotonic() + SECONDS
        while descriptors(process.pid) > before:
            assert time.monotonic() < end
            time.sleep(0.05)
        act_as(alone, robot)
        robot.close()


def test_a_bug_of_ours_tells_the_peer_nothing(
    policy: EdgePolicy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("vqbet_serve.sessions.Session.act", broken)
    with serving(policy) as server, open_client(server.url) as client:
        answer = ask(client, observations(0, 1)[0])
        assert answer == "InternalError: the server's log tells more"
        assert 'reason="InternalError"} 1' in get(server.url, "/metrics")[1]
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BackendError("/home/me failed: Traceback"), "BackendError: the server's log tells more"),
        (
            RemoteError("ray::Policy.answer() (pid=7, ip=10.0.0.9)"),
            "InternalError: the server's log",
        ),
    ],
    ids=["a library's text", "a remote traceback"],
)
def test_what_others_say_stays_on_the_server(
    policy: EdgePolicy,
    error: Exception,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("vqbet_serve.sessions.Session.act", mock.Mock(side_effect=error))
    with serving(policy) as server, open_client(server.url) as client:
        answer = str(ask(client, observations(0, 1)[0]))
    assert answer.startswith(told)
    assert str(error) not in answer
    assert str(error) in caplog.text
