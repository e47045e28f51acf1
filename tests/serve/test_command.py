"""The command `vqbet-serve`: what it refuses, TLS, signals; and what its client loads."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.serving import (
    COMMAND,
    SECONDS,
    ask,
    get,
    observations,
    open_client,
    serving_process,
)
from torture import cases
from vqbet_serve import RemotePolicy
from vqbet_serve.keys import Keys
from vqbet_serve.server import ServeConfig
from websockets.exceptions import ConnectionClosed

from vqbet_edge import BackendError, Guards, UsageError

KEY = "0123456789abcdef"
# Starts the command with a policy that takes a second for every action.
SLOW = """
import time
from vqbet_edge import EdgePolicy
act = EdgePolicy.act
def slow(self, observation):
    time.sleep(1)
    return act(self, observation)
EdgePolicy.act = slow
from vqbet_serve.cli import main
main()
"""


def command(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_no_open_address_without_a_key(mini: Path, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "", "192.168.1.2"):  # noqa: S104 - refused
        code, error = command(str(mini), "--host", host)
        assert code == 2
        assert error.startswith(f"error: '{host}' can be reached from other machines, and whoever")
    key = tmp_path / "key"
    for content in (b"", b"short", b"a key with spaces in it", b"two-lines-of\nkey-in-the-file"):
        key.write_bytes(content)
        code, error = command(str(mini), "--host", "0.0.0.0", "--api-key-file", str(key))  # noqa: S104
        assert code == 2
        assert "expected a key of 16 or more ASCII characters without spaces" in error
    key.write_bytes(b"\xff" * 20)
    assert command(str(mini), "--api-key-file", str(key))[0] == 2
    code, error = command(str(mini), "--api-key-file", str(tmp_path / "none"))
    assert code == 5
    assert "No such file" in error


@pytest.mark.parametrize(
    "wrong",
    [{"max_robots": 0}, {"idle_s": 0}, {"idle_s": float("inf")}, {"seed": -1}, {"port": 1 << 16}],
    ids=str,
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected --"):
        ServeConfig(**wrong)


def test_a_key_is_not_shown() -> None:
    assert KEY not in repr(ServeConfig(keys=Keys(KEY)))


def test_a_port_in_use(mini: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = command(str(mini), "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "address already in use" in error
    assert "Traceback" not in error


def test_half_of_tls(mini: Path, tmp_path: Path) -> None:
    code, error = command(str(mini), "--tls-cert", str(tmp_path / "cert"))
    assert code == 2
    assert "belong together" in error


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    outputs = ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run([*make, *names, *outputs], check=True, capture_output=True)
    return files


def test_tls_and_a_key(mini: Path, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    cert, private = map(str, certificate)
    options = ["--tls-cert", cert, "--tls-key", private, "--api-key-file", str(tmp_path / "key")]
    guards = Guards(deadline_s=SECONDS, on_late="raise")
    with serving_process(mini, *options) as (_, url):
        assert url.startswith("wss://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=cert)
        with RemotePolicy(url, guards=guards, api_key=KEY, tls=trusted) as robot:
            for seen in observations(0, 7):
                assert np.isfinite(robot.act(seen)).all()
            robot.reset()
        with pytest.raises(BackendError, match="CERTIFICATE_VERIFY_FAILED"):
            RemotePolicy(url, guards=guards, api_key=KEY)
        with pytest.raises(BackendError, match="cannot be used"):
            RemotePolicy(url.replace("wss", "ws"), guards=guards, api_key=KEY, connect_s=1)
        with pytest.raises(BackendError, match="401"):
            RemotePolicy(url, guards=guards, api_key=KEY[::-1], tls=trusted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(
    mini: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """What is being computed is answered, who is silent is told, and nobody new comes in."""
    monkeypatch.setattr("serve.serving.COMMAND", [sys.executable, "-c", SLOW])
    with serving_process(mini) as (process, url):
        asking, silent = open_client(url), open_client(url)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(asking, observations(0, 1)[0])))
        thread.start()
        time.sleep(0.5)
        os.kill(process.pid, number)
        with pytest.raises(ConnectionClosed, match="the server stops"):
            silent.recv(SECONDS)
        with pytest.raises(OSError, match="refused"):
            open_client(url)
        thread.join(SECONDS)
        assert isinstance(answers[0], np.ndarray)
        with pytest.raises(ConnectionClosed, match="the server stops"):
            asking.recv(SECONDS)
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_second_signal_does_not_wait(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.serving.COMMAND", [sys.executable, "-c", SLOW.replace("1)", "60)")])
    with serving_process(mini) as (process, url):
        asking = open_client(url)
        thread = threading.Thread(target=_unanswered, args=(asking,))
        thread.start()
        time.sleep(0.5)
        for _ in range(2):
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.2)
        assert process.wait(SECONDS) == -signal.SIGTERM
        thread.join(SECONDS)


def _unanswered(client: Any) -> None:
    with pytest.raises(ConnectionClosed):
        ask(client, observations(0, 1)[0])


def test_health_while_a_policy_computes_for_long(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SLOW.replace("sleep(1)", f"sleep({cases(1, 30)})")
    monkeypatch.setattr("serve.serving.COMMAND", [sys.executable, "-c", slow])
    with serving_process(mini) as (_, url), open_client(url) as client:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(ask(client, observations(0, 1)[0], 60))
        )
        thread.start()
        answered = 0
        while thread.is_alive():
            assert client.ping().wait(SECONDS)
            assert get(url, "/healthz") == (200, "OK\n")
            answered += 1
            time.sleep(0.05)
        assert answered > 3
        assert isinstance(answers[0], np.ndarray)


LOADED = """
import json, sys
before = set(sys.modules)
from vqbet_serve import RemotePolicy
from vqbet_edge import Guards
import numpy as np
with RemotePolicy(sys.argv[1], guards=Guards(deadline_s=20, on_late="raise")) as robot:
    robot.act({"observation.image": np.zeros((24, 24, 3), np.uint8),
               "observation.state": np.ones(2, np.float32)})
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_client_needs_no_backend(mini: Path) -> None:
    with serving_process(mini) as (_, url):
        done = subprocess.run(
            [sys.executable, "-c", LOADED, url], capture_output=True, text=True, check=True
        )
    found = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
    ours = {"vqbet_edge", "vqbet_serve", "typing_extensions"}
    assert found - ours == {"numpy", "msgspec", "safetensors", "websockets"}


def test_the_servers_policy_acts_as_one_in_this_process(mini: Path) -> None:
    """The command's own seed and backend, bitwise."""
    from vqbet_edge import EdgePolicy

    with (
        serving_process(mini, "--seed", "9") as (_, url),
        EdgePolicy.load(mini, "onnxruntime", seed=9) as local,
        open_client(url) as client,
    ):
        for seen in observations(0, 20):
            action = ask(client, seen)
            assert isinstance(action, np.ndarray)
            assert action.tobytes() == local.act(seen).tobytes()
