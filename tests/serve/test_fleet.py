"""A fleet on Ray Serve; and its windows and requests without Ray."""

import asyncio
import json
import os
import socket
import subprocess
import uuid
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from environments import ROOT, prepare
from serve.fleet_peer import LOST_AT, ROBOTS, STEPS, observations
from vqbet_serve.asgi import AsgiConnection
from vqbet_serve.remote_graphs import GraphRunner, RemoteBackend, Request
from vqbet_serve.sessions import Sessions, derived_seed
from websockets.exceptions import ConnectionClosed
from workshop import once

from vqbet_edge import BackendError, EdgePolicy
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


def comes_back(lost: dict[str, Any], bundle: Path) -> None:
    """What a robot was told whose policy has lost all replicas at once: no motion of its own."""
    seen = observations(500, STEPS)
    expected = alone(bundle, derived_seed(0, "lost"), seen)
    acted = np.array(lost["before"] + lost["during"], np.float32)
    # What was planned before is executed; then the last action is held.
    planned = (np.abs(acted - expected[: len(acted)]) <= LIMIT).all(axis=-1)
    count = int(planned.argmin()) if not planned.all() else len(acted)
    assert LOST_AT <= count < len(acted)
    assert (acted[count:] == acted[count - 1]).all()
    assert "BackendError" in lost["told"]
    assert "reset()" in lost["told"]
    assert lost["said"].startswith("BackendError")
    assert lost["said"].endswith(" 1011")
    # A new connection begins the random sequence anew.
    assert (np.abs(np.array(lost["after"], np.float32) - expected) <= LIMIT).all()


@pytest.mark.extended
def test_a_replica_is_lost_and_a_bundle_rolled_out(
    mini: Path, other: Path, misfit: Path, tmp_path: Path
) -> None:
    needs = ["-r", str(REQUIREMENTS), "-c", str(ROOT / "constraints.txt")]
    python, key = prepare("ray", needs), tmp_path / "key"
    key.write_text(KEY)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_", "RAY_"))}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations" / "serve")]),
        "HOME": str(tmp_path),  # Ray keeps its cluster's token there
        "VQBET_FLEET": uuid.uuid4().hex,
    }
    script = ROOT / "tests" / "serve" / "fleet_peer.py"
    command = [python, script, mini, other, misfit, key, port, tmp_path / "told"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540)
    assert done.returncode == 0, done.stderr[-8000:]
    told = json.loads((tmp_path / "told").read_text())
    assert len(told["actions"]) == ROBOTS
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
    comes_back(told["lost"], other)
    refused = told["refused"]
    for name in ("no key", "wrong key", "web page"):
        assert refused[name] == "403"
    # The server hangs up in the middle of the frame: the reason or the reset comes first.
    assert refused["large"].startswith(("1009 ", "1006 "))
    assert refused["text"] == "1011 UsageError: expected binary frames, got text"
    assert refused["garbage"].startswith("1011 UsageError: expected a MessagePack map")
    assert refused["BackendError"] == "BackendError('ours')"
    assert refused["ValueError"] == "BackendError('a replica of the policy failed')"
    assert "does not fit the fleet's robots: expected observation" in refused["misfit"]


@pytest.mark.parametrize("table", [True, False])
def test_windows_here_and_graphs_there_act_as_together(mini: Path, table: bool) -> None:
    """Also where codes are decoded there, for large codebooks have no table."""
    bundle = Bundle.open(mini)
    if not table:
        arrays = {name: array for name, array in bundle.arrays.items() if name != DECODE_TABLE}
        bundle = replace(bundle, arrays=arrays)
    with (
        closing(GraphRunner(bundle, "onnxruntime")) as graphs,
        EdgePolicy(bundle, RemoteBackend(bundle.manifest, graphs.answer)) as policy,
    ):
        for seed in range(3):
            seen = observations(seed, 20)
            with policy.sibling(seed=seed) as robot:
                actions = np.stack([robot.act(each) for each in seen])
            assert (np.abs(actions - alone(mini, seed, seen)) <= LIMIT).all()


def test_requests_that_come_together_fail_one_by_one(
    mini: Path, monkeypatch: pytest.MonkeyPatch
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
    with closing(GraphRunner(Bundle.open(mini), "onnxruntime")) as graphs:
        replies = graphs.run([Request(rows=rows + part, states=states) for part in (0, 7, 1)])
    assert [isinstance(each, BackendError) for each in replies] == [False, True, False]
    monkeypatch.setattr(CpuWindow, "load", Window.load)
    with pytest.raises(BackendError, match=r"keeps windows on its device; .*--backend onnxruntime"):
        GraphRunner(Bundle.open(mini), "onnxruntime")


def test_a_session_takes_the_new_policy_at_its_reset(mini: Path, other: Path) -> None:
    seen, seed = observations(1, 12), derived_seed(0, "arm")
    with (
        EdgePolicy.load(mini, "onnxruntime") as first,
        EdgePolicy.load(other, "onnxruntime") as second,
    ):
        sessions = Sessions(first, 0, 4)
        session = sessions.open("arm")
        half = [session._policy.act(each) for each in seen[:6]]
        sessions.policy = second
        half += [session._policy.act(each) for each in seen[6:]]
        assert (half == alone(mini, seed, seen)).all()
        for start in (None, 9):
            session.reset(start)
            acted = [session._policy.act(each) for each in seen]
            assert (acted == alone(other, seed if start is None else start, seen)).all()
        sessions.close(session)


class FakeWebSocket:
    """What an ASGI server hands over; nobody is there any more once it has no messages."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self._messages, self.closed = list(messages), 0

    async def receive(self) -> dict[str, Any]:
        return self._messages.pop(0) if self._messages else {"type": "websocket.disconnect"}

    async def send_text(self, data: Any) -> None:  # noqa: ARG002
        raise RuntimeError("Unexpected ASGI message 'websocket.send'")

    send_bytes = send_text

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        del reason
        self.closed = code
        raise RuntimeError("gone")


async def received(connection: AsgiConnection) -> list[bytes | str]:
    return [fragment async for fragment in connection.recv_streaming()]


def test_messages_of_an_asgi_server() -> None:
    kind = "websocket.receive"
    messages = [{"type": kind, "bytes": b"12"}, {"type": kind, "text": "ab"}]
    connection = AsgiConnection(FakeWebSocket(*messages), 2)
    assert asyncio.run(received(connection)) == [b"12"]
    assert asyncio.run(received(connection)) == ["ab"]
    large = FakeWebSocket({"type": kind, "bytes": b"123"})
    with pytest.raises(ConnectionClosed) as closed:
        asyncio.run(received(AsgiConnection(large, 2)))
    assert closed.value.sent is not None
    assert closed.value.sent.code == large.closed == 1009
    for step in (received(connection), connection.send(b"x"), connection.close(1000, "")):
        with suppress(ConnectionClosed):
            asyncio.run(step)  # type: ignore[arg-type]
            assert step.__name__ == "close"
