"""A fleet on Ray Serve; and its windows and requests without Ray."""

import asyncio
import json
import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from environments import ROOT, prepare
from serve.fleet_peer import ROBOTS, STEPS, observations
from vqbet_serve.asgi import AsgiConnection
from vqbet_serve.elsewhere import Elsewhere, Graphs, Reply, Request
from vqbet_serve.sessions import Sessions, derived_seed
from websockets.exceptions import ConnectionClosed
from workshop import once

from vqbet_edge import BackendError, EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.backends.base import Window
from vqbet_edge.runtime.backends.cpu import CpuWindow
from vqbet_edge.runtime.bundle import DECODE_TABLE, Bundle

REQUIREMENTS = Path(__file__).with_name("requirements-ray.txt")
# Of the action's range: what float32 rounds.
LIMIT = 1e-5 * (miniature.HIGH - miniature.LOW)
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def other(shared: Path) -> Path:
    """Another policy for the same robot."""
    policy = miniature.checkpoint()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    path = shared / "fleet-other.bundle"
    return once(path, lambda: miniature.write(path, policy))


@pytest.fixture(scope="module")
def misfit(shared: Path) -> Path:
    """A policy for a camera of another size."""
    policy = miniature.checkpoint((32, 32))
    path = shared / "fleet-misfit.bundle"
    return once(path, lambda: miniature.write(path, policy))


def alone(bundle: Path, seed: int, seen: list[dict[str, np.ndarray]]) -> np.ndarray:
    with EdgePolicy.load(bundle, "onnxruntime", seed=seed) as policy:
        return np.stack([policy.act(each) for each in seen])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_replica_is_lost_and_a_bundle_rolled_out(
    mini: Path, other: Path, misfit: Path, tmp_path: Path
) -> None:
    needs = ["-r", str(REQUIREMENTS), "-c", str(ROOT / "constraints.txt")]
    python = prepare("ray", needs)
    key = tmp_path / "key"
    key.write_text(KEY)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_", "RAY_"))}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations" / "serve")]),
        "HOME": str(tmp_path),  # Ray keeps its cluster's token there
        "VQBET_FLEET": uuid.uuid4().hex,
    }
    script = ROOT / "tests" / "serve" / "fleet_peer.py"
    command = [python, script, mini, other, misfit, key, str(free_port()), tmp_path / "told"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540)
    assert done.returncode == 0, done.stderr[-8000:]
    told = json.loads((tmp_path / "told").read_text())
    assert told["errors"] == [""] * ROBOTS
    assert told["killed"] == 2
    assert told["names"] == ["policy-1", "policy-2"]
    # Episodes that had begun end with the first one.
    assert told["applications"].keys() == {"policy-1", "policy-2", "robots"}
    for number, acted in enumerate(told["actions"]):
        seed, actions = derived_seed(0, f"robot {number}"), np.array(acted, np.float32)
        for episode, bundle in enumerate((mini, other)):
            expected = alone(bundle, seed, observations(number + 100 * episode, STEPS))
            got = actions[episode * STEPS : (episode + 1) * STEPS]
            assert (np.abs(got - expected) <= LIMIT).all()
    refused = told["refused"]
    for name in ("no key", "wrong key", "web page"):
        assert refused[name] == "403"
    assert refused["large"].startswith("1009 ")
    assert refused["text"] == "1011 UsageError: expected binary frames, got text"
    assert refused["garbage"].startswith("1011 UsageError: expected a MessagePack map")
    assert refused["BackendError"] == "BackendError('ours')"
    assert refused["ValueError"] == "BackendError('a replica of the policy failed')"
    assert "does not fit the fleet's robots: expected observation" in refused["misfit"]


def asked(graphs: Graphs, request: Request) -> Reply:
    (reply,) = graphs.run([request])
    if isinstance(reply, VQBeTEdgeError):
        raise reply
    return reply


@pytest.fixture
def graphs(mini: Path) -> Iterator[Graphs]:
    with closing(Graphs(Bundle.open(mini), "onnxruntime")) as made:
        yield made


def test_windows_elsewhere_act_as_those_here(mini: Path, graphs: Graphs) -> None:
    bundle = Bundle.open(mini)
    backend = Elsewhere(bundle.manifest, lambda request: asked(graphs, request))
    with EdgePolicy(bundle, backend) as policy:
        for seed in range(3):
            seen = observations(seed, 20)
            with policy.sibling(seed=seed) as robot:
                actions = np.stack([robot.act(each) for each in seen])
            assert (np.abs(actions - alone(mini, seed, seen)) <= LIMIT).all()


def test_codes_are_decoded_elsewhere(mini: Path) -> None:
    """Large codebooks have no table; here it is left out."""
    bundle = Bundle.open(mini)
    table = bundle.arrays[DECODE_TABLE]
    arrays = {name: array for name, array in bundle.arrays.items() if name != DECODE_TABLE}
    without = replace(bundle, arrays=arrays)
    with closing(Graphs(without, "onnxruntime")) as graphs:
        backend = Elsewhere(bundle.manifest, lambda request: asked(graphs, request))
        chunk = backend.create_window().decode(np.array([1, 2]))
    assert np.abs(chunk - table[1, 2]).max() <= 1e-5


def test_requests_that_come_together_fail_one_by_one(
    mini: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Bundle.open(mini).manifest.policy
    rows = np.zeros((policy.n_obs_steps, 1, policy.gpt_hidden_dim), np.float32)
    states = np.zeros((policy.n_obs_steps, 2), np.float32)
    load = CpuWindow.load

    def loading(self: CpuWindow, tokens: np.ndarray) -> None:
        if tokens[0, 0, 0] == 7:
            raise BackendError("seven")
        load(self, tokens)

    monkeypatch.setattr(CpuWindow, "load", loading)
    replies = graphs.run([Request(rows=rows + part, states=states) for part in (0, 7, 1)])
    assert [isinstance(each, BackendError) for each in replies] == [False, True, False]


def test_a_backend_that_keeps_windows_on_its_device_is_refused(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuWindow, "load", Window.load)
    with pytest.raises(BackendError, match=r"keeps windows on its device; .*--backend onnxruntime"):
        Graphs(Bundle.open(mini), "onnxruntime")


def test_a_session_takes_the_new_policy_at_its_reset(mini: Path, other: Path) -> None:
    before, after = observations(1, 12), observations(2, 12)
    with (
        EdgePolicy.load(mini, "onnxruntime") as first,
        EdgePolicy.load(other, "onnxruntime") as second,
    ):
        sessions = Sessions(first, 0, 4)
        session = sessions.open("arm")

        def acted(seen: list[dict[str, np.ndarray]]) -> np.ndarray:
            return np.stack([session._policy.act(each) for each in seen])

        half = acted(before[:6])
        sessions.policy = second
        seed = derived_seed(0, "arm")
        episode = np.concatenate([half, acted(before[6:])])
        assert episode.tobytes() == alone(mini, seed, before).tobytes()
        session.reset(None)
        assert acted(after).tobytes() == alone(other, seed, after).tobytes()
        session.reset(9)
        assert acted(after).tobytes() == alone(other, 9, after).tobytes()
        sessions.close(session)


class FakeWebSocket:
    """What an ASGI server hands over."""

    def __init__(self, *messages: dict[str, Any], gone: bool = False) -> None:
        self._messages, self._gone = list(messages), gone
        self.sent: list[bytes | str] = []
        self.closed: list[int] = []

    async def receive(self) -> dict[str, Any]:
        return self._messages.pop(0)

    async def send_bytes(self, data: bytes) -> None:
        await self.send_text(data)  # type: ignore[arg-type]

    async def send_text(self, data: str) -> None:
        if self._gone:
            raise RuntimeError("Unexpected ASGI message 'websocket.send'")
        self.sent.append(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        del reason
        if self._gone:
            raise RuntimeError("gone")
        self.closed.append(code)


async def received(connection: AsgiConnection) -> list[bytes | str]:
    return [fragment async for fragment in connection.recv_streaming()]


def run(*steps: Any) -> Any:
    async def all_of_them() -> Any:
        return [await step for step in steps]

    return asyncio.run(all_of_them())


def test_messages_of_an_asgi_server() -> None:
    kind = "websocket.receive"
    websocket = FakeWebSocket(
        {"type": kind, "bytes": b"12"},
        {"type": kind, "text": "ab"},
        {"type": kind, "bytes": b"123"},
    )
    connection = AsgiConnection(websocket, 2)
    assert run(received(connection), received(connection)) == [[b"12"], ["ab"]]
    with pytest.raises(ConnectionClosed) as closed:
        run(received(connection))
    assert closed.value.sent is not None
    assert closed.value.sent.code == 1009
    assert websocket.closed == [1009]
    run(connection.close(1011, "again"))
    assert websocket.closed == [1009]


def test_a_peer_that_has_left_an_asgi_server() -> None:
    left = AsgiConnection(FakeWebSocket({"type": "websocket.disconnect", "code": 1006}), 2)
    gone = AsgiConnection(FakeWebSocket(gone=True), 2)
    for step in (received(left), left.send(b"x"), gone.send(b"x"), gone.send("x"), received(gone)):
        with pytest.raises(ConnectionClosed):
            run(step)
    run(left.close(1000, ""), AsgiConnection(FakeWebSocket(gone=True), 2).close(1000, ""))
