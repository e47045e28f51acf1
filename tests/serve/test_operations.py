"""Keys, metrics and readiness of a server that runs for months, and the files to run it with."""

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock
from urllib.error import HTTPError

import numpy as np
import pytest
from environments import ROOT
from serve.serving import acts_as, ask, get, observations, open_client, serving
from vqbet_serve.cli import Arguments
from vqbet_serve.keys import Keys
from vqbet_serve.metrics import Metrics
from vqbet_serve.readiness import ReferenceStep
from vqbet_serve.remote_graphs import GraphRunner, RemoteBackend, Reply, Request
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vqbet_edge import BackendError, EdgePolicy, UsageError, VerificationError, cli
from vqbet_edge.runtime.bundle import Bundle

ARM, OLD, NEW = "a" * 20, "b" * 20, "c" * 20
SERVE = ROOT / "integrations" / "serve"
UNIT = SERVE / "vqbet-serve.service"


def header(key: str) -> dict[str, str]:
    return {"Authorization": f"Api-Key {key}"}


def write(path: Path, text: str) -> None:
    """As an editor does: another file takes its place."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("# none\n\n", "expected a key of 16 or more"),
        ("short", "alone on its line or behind a robot's name, got 5"),
        (f"arm-1 {ARM} {OLD}", "alone on its line"),
        (f"arm-1 {ARM}\nthe arm", "got 3"),
        (f"arm/1 {ARM}", "expected a name of 1 to 64 letters"),
        (f"arm-1 {ARM}\narm-2 {ARM}", "got one twice"),
    ],
)
def test_keys_that_are_none(text: str, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        Keys(text)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xff" * 20)
    with pytest.raises(UsageError, match="is not a file with keys in ASCII"):
        Keys.read(tmp_path / "keys")


def test_keys_are_rotated_without_a_restart(
    policy: EdgePolicy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A robot's new key holds beside the old one; what is taken out ends with its next request."""
    path, seen = tmp_path / "keys", observations(0, 3)
    write(path, f"# two robots\narm-1 {ARM}\n\narm-2 {OLD}\n")
    with serving(policy, keys=Keys.read(path)) as server:
        first = open_client(server.url, additional_headers=header(ARM))
        second = open_client(server.url, additional_headers=header(OLD))
        with pytest.raises(InvalidStatus, match="401"):
            open_client(server.url, additional_headers=header(NEW))
        for client in (first, second):
            assert isinstance(ask(client, seen[0]), np.ndarray)
        write(path, f"arm-1 {ARM}\narm-2 {OLD}\narm-2 {NEW}\n")
        third = open_client(server.url, additional_headers=header(NEW))
        write(path, "not a key")  # said, and nothing changes
        assert isinstance(ask(second, seen[1]), np.ndarray)
        assert "the keys from before still hold: expected a key" in caplog.text
        write(path, f"arm-1 {ARM}\narm-2 {NEW}\n")
        answer = ask(second, seen[2])
        assert answer == "UsageError: the key of 'arm-2' was withdrawn; connect with its new one"
        with pytest.raises(ConnectionClosed):
            ask(second, seen[2])
        for client in (first, third):
            assert isinstance(ask(client, seen[1]), np.ndarray)
        with pytest.raises(InvalidStatus, match="401"):
            open_client(server.url, additional_headers=header(OLD))
        path.unlink()
        text = get(server.url, "/metrics", **header(ARM))[1]
        assert 'vqbet_robot_steps_total{robot="arm-1"} 2\n' in text
        assert 'vqbet_robot_steps_total{robot="arm-2"} 3\n' in text
        for client in (first, third):
            client.close()
    assert "robot 'arm-2' at 127.0.0.1 was refused: UsageError: the key of" in caplog.text
    assert not any(key in caplog.text for key in (ARM, OLD, NEW))


def unready(url: str) -> str:
    with pytest.raises(HTTPError) as refused:
        get(url, "/readyz")
    assert refused.value.code == 503
    return refused.value.read().decode()


def test_readiness_acts_out_a_reference_step(mini: Path, policy: EdgePolicy) -> None:
    """What a robot is told meanwhile is bitwise its own."""
    step = ReferenceStep(policy, Bundle.open(mini))
    with policy.sibling() as robot, policy.sibling() as alone:
        for seen in observations(2, 12):
            step()
            assert robot.act(seen).tobytes() == alone.act(seen).tobytes()


def test_a_broken_backend_is_not_ready(
    policy: EdgePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked once in ten seconds, whoever asks, and what it says stays in the log."""
    check = Mock(side_effect=BackendError("secret"))
    with serving(policy, check=check) as server:
        for _ in range(3):
            assert unready(server.url) == "the policy does not act; the server's log tells more\n"
        assert get(server.url, "/healthz") == (200, "OK\n")
    assert check.call_count == 1
    assert "secret" in caplog.text


def test_a_stuck_backend_is_not_ready(policy: EdgePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Robots and pages go on, and no second check waits behind the first."""
    monkeypatch.setattr("vqbet_serve.readiness._WAIT_S", 0.1)
    monkeypatch.setattr("vqbet_serve.readiness._FRESH_S", 0.0)
    go, check = threading.Event(), Mock(side_effect=lambda: go.wait(20))
    with serving(policy, check=check) as server, open_client(server.url) as robot:
        for seen in observations(0, 2):
            assert unready(server.url).startswith("the policy has not answered for")
            assert isinstance(ask(robot, seen), np.ndarray)
        assert check.call_count == 1
        go.set()
        assert get(server.url, "/readyz")[0] == 200


def test_a_replica_that_computes_something_else_is_not_ready(mini: Path) -> None:
    """What Ray asks of one, before it replaces it."""
    bundle, broken = Bundle.open(mini), []
    with closing(GraphRunner(bundle, "onnxruntime")) as graphs:

        def answer(request: Request) -> Reply:
            reply = graphs.answer(request)
            if not broken or reply.outputs is None:
                return reply
            offsets = reply.outputs.offsets + 1
            return reply._replace(outputs=reply.outputs._replace(offsets=offsets))

        with EdgePolicy(bundle, RemoteBackend(bundle.manifest, answer)) as policy:
            step = ReferenceStep(policy, bundle)
            step()
            broken.append(True)
            with pytest.raises(VerificationError, match="came out wrong: its chunk is"):
                step()


def test_a_page_for_scrapers_and_a_dashboard_of_it(policy: EdgePolicy) -> None:
    """Every name in the dashboard is in `/metrics`, and every number there is in it."""
    with (
        serving(policy) as server,
        open_client(server.url) as client,
        policy.sibling() as local,
    ):
        acts_as(local, client, observations(1, 3))
        server.metrics.refusal("UsageError")
        status, text = get(server.url, "/metrics")
    assert status == 200
    assert "vqbet_robots 1\n" in text
    assert "vqbet_step_seconds_count 3\n" in text
    assert 'vqbet_step_seconds_bucket{le="+Inf"} 3\n' in text
    assert 'vqbet_robot_idle_seconds{robot="unnamed"} 0.' in text
    there = set(re.findall(r"^(vqbet_\w+)", text, re.MULTILINE))
    panels = json.loads((SERVE / "grafana.json").read_text())["panels"]
    expressions = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    shown = set(re.findall(r"vqbet_\w+", expressions))
    assert shown <= there
    assert there - shown == {"vqbet_step_seconds_sum", "vqbet_step_seconds_count"}


def test_late_steps_are_counted_by_robot() -> None:
    metrics = Metrics(period_s=0.1)
    for seconds, robot in ((0.05, "arm-1"), (0.2, "arm-1"), (0.05, "arm-2")):
        metrics.step(seconds, robot)
    text = metrics.text(2, {})
    assert 'vqbet_robot_late_steps_total{robot="arm-1"} 1\n' in text
    assert 'vqbet_robot_late_steps_total{robot="arm-2"} 0\n' in text


def test_the_units_command_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    program, *options = shlex.split(command)
    assert Path(program).name == "vqbet-serve"
    monkeypatch.setattr("sys.argv", ["vqbet-serve", *options])
    arguments = cli.parse(Arguments, "vqbet-serve")
    assert arguments.bundle == "/opt/vqbet/policy.bundle"
    assert arguments.api_key_file == Path("/etc/vqbet/keys")
    assert (arguments.tls_cert is None) == (arguments.tls_key is None)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not here")
    path, environment = tmp_path / UNIT.name, os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    for more in ("", "\nNonsense=1"):  # it does look
        text = UNIT.read_text().replace("/opt/vqbet/bin/vqbet-serve", "/bin/true")
        path.write_text(text.replace("[Service]", f"[Service]{more}"))
        done = subprocess.run([analyze, "verify", path], capture_output=True, env=environment)
        assert (UNIT.name.encode() in done.stderr) == bool(more), done.stderr
