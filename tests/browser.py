"""A headless Chromium, driven over its DevTools protocol, to see pages as people do."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from environments import impossible

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 60


class Tab:
    """One page: what it asked for, what it complained of, how it looks."""

    def __init__(self, connection: Any) -> None:
        self._connection, self._sent = connection, 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """One command's result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        self._connection.send(json.dumps(message))
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path, width: int, height: int = 800) -> None:
        """Load a file in a window of so many pixels and wait until all is drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", **options)["result"].get("value")

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._connection.recv(TIMEOUT))
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                if not params["request"]["url"].startswith("data:"):
                    self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(str(params["args"]))
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
        return message


@contextmanager
def chromium() -> Iterator[Tab]:
    """A fresh tab; where there is no Chromium, a skip with the reason, in CI a failure."""
    websockets = pytest.importorskip("websockets.sync.client")
    binary = next((found for found in map(shutil.which, NAMES) if found), None)
    if binary is None:
        impossible("there is no Chromium here: apt-get install chromium-headless-shell")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        options += ["--hide-scrollbars", f"--user-data-dir={profile}"]
        if os.geteuid() == 0:  # its sandbox does not work for root
            options.append("--no-sandbox")
        # Its wrapper would end alone.
        process = subprocess.Popen(
            [binary, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            url = _page_url(Path(profile) / "DevToolsActivePort", process)
            with websockets.connect(url, max_size=None, proxy=None) as connection:
                yield Tab(connection)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(TIMEOUT)


def _page_url(announced: Path, process: subprocess.Popen[bytes]) -> str:
    """The websocket of the first page, once the browser listens."""
    from urllib.request import ProxyHandler, build_opener

    end = time.monotonic() + TIMEOUT
    while not (announced.is_file() and announced.read_text().count("\n")):
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        assert time.monotonic() < end, "Chromium does not start"
        time.sleep(0.05)
    port = announced.read_text().split("\n")[0]
    direct = build_opener(ProxyHandler({}))
    while True:
        with direct.open(f"http://127.0.0.1:{port}/json/list", timeout=TIMEOUT) as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        if pages:
            url: str = pages[0]["webSocketDebuggerUrl"]
            return url
        assert time.monotonic() < end, "Chromium opens no page"
        time.sleep(0.05)
