"""Robots that share runs of the transformer: each acts as if alone, and none waits for nobody."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import miniature
import numpy as np
import pytest
from serve.serving import (
    SECONDS,
    acts_as,
    ask,
    get,
    observations,
    open_client,
    serving,
    until,
)
from vqbet_serve.batching import Gatherer
from vqbet_serve.sessions import derived_seed

from vqbet_edge import BackendError, EdgePolicy, UsageError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.base import Backend, GptRun
from vqbet_edge.runtime.bundle import Bundle

# Of the action's range: what float32 rounds.
LIMIT = 1e-5 * (miniature.HIGH - miniature.LOW)
STEPS = 15


@pytest.fixture
def backend(mini: Path) -> Backend:
    return create_backend("onnxruntime", Bundle.open(mini))


@pytest.fixture
def policy(mini: Path, backend: Backend) -> Iterator[EdgePolicy]:
    with EdgePolicy(Bundle.open(mini), backend) as loaded:
        yield loaded


def together(count: int, act: Any) -> None:
    """Call `act(number, barrier)` on as many threads."""
    barrier = threading.Barrier(count)
    threads = [threading.Thread(target=act, args=(i, barrier)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)


def counted(url: str, name: str) -> int:
    lines = get(url, "/metrics")[1].splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def act_as_alone(url: str, mini: Path, count: int) -> None:
    """Robots that all ask at the same time, step by step; other codes would be other actions."""
    acted: list[list[np.ndarray | str]] = [[] for _ in range(count)]

    def robot(number: int, barrier: threading.Barrier) -> None:
        with open_client(url) as client:
            for seen in observations(number, STEPS):
                barrier.wait(SECONDS)
                acted[number].append(ask(client, {**seen, "session_id": str(number)}))

    together(count, robot)
    for number in range(count):
        with EdgePolicy.load(mini, "onnxruntime", seed=derived_seed(0, str(number))) as alone:
            for seen, action in zip(observations(number, STEPS), acted[number], strict=True):
                assert isinstance(action, np.ndarray), action
                assert (np.abs(action - alone.act(seen)) <= LIMIT).all()


@pytest.mark.parametrize(("count", "fails"), [(2, False), (11, False), (3, True)])
def test_robots_that_ask_together_act_as_if_alone(
    mini: Path,
    policy: EdgePolicy,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    fails: bool,
) -> None:
    """And where a shared run fails, each is run alone."""
    gathering = {"vqbet-newest", "vqbet-prefill"}
    with serving(policy, backend, max_robots=count, batch_wait_s=1.0) as server:
        failing = Mock(side_effect=BackendError("no"))
        if fails:
            monkeypatch.setattr(backend, "run_together", failing)
        assert gathering <= {thread.name for thread in threading.enumerate()}
        act_as_alone(server.url, mini, count)
        runs = counted(server.url, "vqbet_shared_runs_total")
        windows = counted(server.url, "vqbet_shared_windows_total")
        assert (runs > 0) == (not fails) == (not failing.called)
        assert 2 * runs <= windows <= min(count, backend.most_together) * runs
    assert not gathering & {thread.name for thread in threading.enumerate()}


def test_the_only_robot_acts_bitwise_as_always(
    mini: Path, policy: EdgePolicy, backend: Backend
) -> None:
    with (
        serving(policy, backend, batch_wait_s=1.0) as server,
        EdgePolicy.load(mini, "onnxruntime") as alone,
        open_client(server.url) as client,
    ):
        acts_as(alone, client, observations(4, 12))
        assert counted(server.url, "vqbet_shared_runs_total") == 0


class FakeWindow:
    def __init__(self, *, broken: bool = False) -> None:
        self.alone, self.broken = 0, broken

    def run_alone(self, part: str) -> None:
        del part
        self.alone += 1
        if self.broken:
            raise BackendError("broken")

    def close(self) -> None:
        pass


class Fake:
    """A backend with windows that only count, and its gatherer, which waits for ever."""

    shared_parts, most_together = get_args(GptRun), 4
    create_window = FakeWindow

    def __init__(self, *windows: FakeWindow) -> None:
        self.windows, self.together, self.run_shared = [None, *windows], [], None  # type: ignore[var-annotated]
        self.gatherer = Gatherer(self, 1000.0, lambda _: None)  # type: ignore[arg-type]
        self.together.clear()  # of warming up

    def run_together(self, part: str, windows: list[Any]) -> None:
        del part
        self.together.append(len(windows))
        if any(window.broken for window in windows):
            raise BackendError("one of them is broken")


@pytest.mark.parametrize("broken", [None, 1])
def test_nobody_waits_when_all_who_act_are_there(broken: int | None) -> None:
    """Nor for those who do not act; and only the robot at fault fails."""
    windows = [FakeWindow(broken=number == broken) for number in range(3)]
    fake, errors = Fake(*windows, FakeWindow()), {}

    def act(number: int, barrier: threading.Barrier) -> None:
        with fake.gatherer.step():
            barrier.wait(SECONDS)
            try:
                fake.run_shared(windows[number], "newest")  # type: ignore[misc]
            except BackendError as error:
                errors[number] = str(error)

    together(3, act)
    fake.gatherer.close()
    assert fake.run_shared is None
    assert fake.together == [3]
    assert errors == ({} if broken is None else {broken: "broken"})
    assert [window.alone for window in windows] == [broken is not None] * 3


def test_who_waits_when_the_server_stops_is_run() -> None:
    window = FakeWindow()
    fake = Fake(window, FakeWindow())
    thread = threading.Thread(target=fake.run_shared, args=(window, "prefill"))
    thread.start()
    until(lambda: fake.gatherer._waiting["prefill"])
    fake.gatherer.close()
    thread.join(SECONDS)
    assert window.alone == 1


def test_how_long_to_wait_is_limited(policy: EdgePolicy, backend: Backend) -> None:
    for wrong in (-0.001, 1.5, float("nan")):
        with (
            pytest.raises(UsageError, match=r"expected --batch-wait-ms in 0\.\.1000"),
            serving(policy, backend, batch_wait_s=wrong),
        ):
            pass
    with serving(policy, backend, batch_wait_s=0.0):
        assert backend.run_shared is None
