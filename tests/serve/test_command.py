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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.serving import (
    SECONDS,
    acts_as,
    ask,
    get,
    observations,
    open_client,
    serving_process,
)
from vqbet_serve import RemotePolicy, cli
from vqbet_serve.keys import Keys
from vqbet_serve.server import ServeConfig
from websockets.exceptions import ConnectionClosed

from vqbet_edge import BackendError, EdgePolicy, Guards, UsageError

KEY = "0123456789abcdef"
# Run before the command: every action says that it is under way, and takes a second.
SLOW = """
import sys, time
from vqbet_edge import EdgePolicy
act = EdgePolicy.act
def slow(self, observation):
    print("acting", file=sys.stderr, flush=True)
    time.sleep(1)
    return act(self, observation)
EdgePolicy.act = slow
"""


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "'0.0.0.0' can be reached from other machines, and whoever"),  # noqa: S104
        (["--host", ""], 2, "'' can be reached from other machines"),
        (["--host", "0.0.0.0", "--api-key-file", "short"], 2, "expected a key of 16 or more"),  # noqa: S104
        (["--api-key-file", "none"], 5, "No such file"),
        (["--tls-cert", "cert"], 2, "belong together"),
        (
            ["--backend", "onnxruntime", "--require", "tensorrt"],
            2,
            "none of those required: tensorrt",
        ),
        (["--predict-within-s", "1e-9"], 6, "ms here on"),
        (["--port", "TAKEN"], 1, "address already in use"),
    ],
)
def test_refuses(
    mini: Path,
    cwd: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    said: str,
) -> None:
    (cwd / "short").write_text("short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [port if each == "TAKEN" else each for each in options]
        monkeypatch.setattr("sys.argv", ["vqbet-serve", str(mini), *given])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == code
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "Traceback" not in error


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


def test_the_command_and_a_client_without_a_backend(mini: Path) -> None:
    """Its own seed and backend, bitwise; a reference step each time that somebody asks."""
    with serving_process(mini, "--seed", "9") as (_, url):
        for _ in range(2):
            assert get(url, "/readyz") == (200, "OK\n")
        with (
            EdgePolicy.load(mini, "onnxruntime", seed=9) as local,
            open_client(url) as client,
        ):
            acts_as(local, client, observations(0, 20))
        done = subprocess.run(
            [sys.executable, "-c", LOADED, url], capture_output=True, text=True, check=True
        )
    found = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
    ours = {"vqbet_edge", "vqbet_serve", "typing_extensions"}
    assert found - ours == {"numpy", "msgspec", "safetensors", "websockets"}


def test_tls_and_a_key(mini: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    cert, private, keys = (str(tmp_path / name) for name in ("cert.pem", "key.pem", "keys"))
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    outputs = ["-out", cert, "-keyout", private]
    subprocess.run([*make, *names, *outputs], check=True, capture_output=True)
    Path(keys).write_text(KEY + "\n")
    options = ["--tls-cert", cert, "--tls-key", private, "--api-key-file", keys]
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
            RemotePolicy(url, guards=guards, api_key=KEY[::-1], tls=trusted, connect_s=SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(mini: Path, number: signal.Signals) -> None:
    """What is being computed is answered, who is silent is told, and nobody new comes in."""
    with serving_process(mini, before=SLOW) as (process, url):
        asking, silent = open_client(url), open_client(url)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(asking, observations(0, 1)[0])))
        thread.start()
        assert process.stderr is not None
        assert process.stderr.readline() == "acting\n"
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
        assert process.stderr.read() == ""


def test_a_second_signal_does_not_wait(mini: Path) -> None:
    with serving_process(mini, before=SLOW.replace("(1)", "(60)")) as (process, url):
        asking, silent = open_client(url), open_client(url)

        def unanswered() -> None:
            with pytest.raises(ConnectionClosed):
                ask(asking, observations(0, 1)[0])

        thread = threading.Thread(target=unanswered)
        thread.start()
        assert process.stderr is not None
        assert process.stderr.readline() == "acting\n"
        os.kill(process.pid, signal.SIGTERM)
        with pytest.raises(ConnectionClosed, match="the server stops"):
            silent.recv(SECONDS)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(SECONDS) == -signal.SIGTERM
        thread.join(SECONDS)
