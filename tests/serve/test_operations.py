"""Keys, metrics and readiness of a server that runs for months, and the files to run it with."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from environments import ROOT
from serve.serving import ask, get, observations, open_client, serving, serving_process
from vqbet_serve.cli import Arguments
from vqbet_serve.elsewhere import Elsewhere, Graphs, Reply, Request
from vqbet_serve.keys import Keys
from vqbet_serve.metrics import Metrics
from vqbet_serve.readiness import Readiness, ReferenceStep
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vqbet_edge import BackendError, EdgePolicy, UsageError, VerificationError, cli
from vqbet_edge.runtime.bundle import Bundle

ARM, OLD, NEW = "a" * 20, "b" * 20, "c" * 20
SERVE = ROOT / "integrations" / "serve"


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
        ("", "expected a key of 16 or more"),
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


def test_late_and_idle_robots_are_counted() -> None:
    metrics = Metrics(period_s=0.1)
    for seconds, robot in ((0.05, "arm-1"), (0.2, "arm-1"), (0.05, "arm-2")):
        metrics.step(seconds, robot)
    text = metrics.text(2, {"arm-1": 12.5})
    assert 'vqbet_robot_late_steps_total{robot="arm-1"} 1\n' in text
    assert 'vqbet_robot_late_steps_total{robot="arm-2"} 0\n' in text
    assert 'vqbet_robot_idle_seconds{robot="arm-1"} 12.5\n' in text


def test_the_command_is_ready(mini: Path) -> None:
    with serving_process(mini) as (_, url):
        for _ in range(2):
            assert get(url, "/readyz") == (200, "OK\n")


def unready(url: str) -> str:
    with pytest.raises(HTTPError) as refused:
        get(url, "/readyz")
    assert refused.value.code == 503
    return refused.value.read().decode()


def test_readiness_acts_out_a_reference_step(mini: Path, policy: EdgePolicy) -> None:
    """What a robot is told meanwhile is bitwise its own."""
    bundle = Bundle.open(mini)
    step = ReferenceStep(policy, bundle)
    with policy.sibling() as robot, policy.sibling() as alone:
        for seen in observations(2, 12):
            step()
            assert robot.act(seen).tobytes() == alone.act(seen).tobytes()
    step._expected = step._expected + np.float32(0.1)
    with pytest.raises(VerificationError, match="came out wrong: its chunk is"):
        step()


def test_a_broken_backend_is_not_ready(
    policy: EdgePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked once in ten seconds, whoever asks, and what it says stays in the log."""
    asked = []

    def check() -> None:
        asked.append(1)
        raise BackendError("secret")

    with serving(policy, check=check) as server:
        for _ in range(3):
            assert unready(server.url) == "the policy does not act; the server's log tells more\n"
        assert get(server.url, "/healthz") == (200, "OK\n")
    assert asked == [1]
    assert "secret" in caplog.text


def test_a_stuck_backend_is_not_ready(policy: EdgePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Robots and pages go on, and no second check waits behind the first."""
    monkeypatch.setattr("vqbet_serve.readiness._WAIT_S", 0.2)
    monkeypatch.setattr("vqbet_serve.readiness._FRESH_S", 0.0)
    go, asked = threading.Event(), []

    def check() -> None:
        asked.append(1)
        go.wait(20)

    with serving(policy, check=check) as server, open_client(server.url) as robot:
        for seen in observations(0, 2):
            assert unready(server.url).startswith("the policy has not answered for")
            assert isinstance(ask(robot, seen), np.ndarray)
        assert asked == [1]
        go.set()
        assert get(server.url, "/readyz")[0] == 200


def test_a_replica_that_computes_something_else_is_not_ready(mini: Path) -> None:
    """What Ray asks of one, before it replaces it."""
    import asyncio

    bundle, broken = Bundle.open(mini), []
    graphs = Graphs(bundle, "onnxruntime")

    def answer(request: Request) -> Reply:
        reply = graphs.answer(request)
        if broken and reply.outputs is not None:
            return reply._replace(outputs=reply.outputs._replace(offsets=reply.outputs.offsets + 1))
        return reply

    with EdgePolicy(bundle, Elsewhere(bundle.manifest, answer)) as policy:
        step = ReferenceStep(policy, bundle)
        assert asyncio.run(Readiness(step).failure()) == ""
        broken.append(True)
        assert asyncio.run(Readiness(step).failure()).startswith("the policy does not act")
    graphs.close()


def test_the_dashboard_shows_what_is_counted() -> None:
    """Every name in it is in `/metrics`, and every number there is in it."""
    metrics = Metrics()
    metrics.step(0.01, "arm-1")
    metrics.refusal("UsageError")
    text = metrics.text(1, {"arm-1": 1.0})
    there = set(re.findall(r"^(vqbet_\w+)", text, re.MULTILINE))
    panels = json.loads((SERVE / "grafana.json").read_text())["panels"]
    expressions = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    shown = set(re.findall(r"vqbet_\w+", expressions))
    assert shown <= there
    assert there - shown == {"vqbet_step_seconds_sum", "vqbet_step_seconds_count"}


def unit() -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(SERVE / "vqbet-serve.service")
    return dict(parser["Service"])


def test_the_units_command_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    program, *options = shlex.split(unit()["ExecStart"])
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
    text = (SERVE / "vqbet-serve.service").read_text()
    path = tmp_path / "vqbet-serve.service"
    path.write_text(text.replace("/opt/vqbet/bin/vqbet-serve", "/bin/true"))
    environment = {"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": os.environ["PATH"]}

    def said() -> str:
        command = [analyze, "verify", path]
        return subprocess.run(command, capture_output=True, text=True, env=environment).stderr

    assert "vqbet-serve.service" not in said(), said()
    path.write_text(path.read_text().replace("[Service]", "[Service]\nNonsense=1"))
    assert "vqbet-serve.service" in said()  # it does look
