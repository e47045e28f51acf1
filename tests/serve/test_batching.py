"""Robots that share runs of the transformer: each acts as if alone, and none waits for nobody."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import miniature
import numpy as np
import pytest
from serve.serving import SECONDS, ask, get, observations, open_client, serving
from vqbet_serve.batching import Gatherer
from vqbet_serve.sessions import derived_seed

from vqbet_edge import BackendError, EdgePolicy, UsageError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.base import Backend, GptRun
from vqbet_edge.runtime.bundle import Bundle

# Of the action's range: what float32 rounds.
LIMIT = 1e-5 * (miniature.HIGH - miniature.LOW)
Acted = list[tuple[np.ndarray, tuple[int, ...]]]


@pytest.fixture
def backend(mini: Path) -> Backend:
    return create_backend("onnxruntime", Bundle.open(mini))


@pytest.fixture
def policy(mini: Path, backend: Backend) -> Iterator[EdgePolicy]:
    with EdgePolicy(Bundle.open(mini), backend) as loaded:
        yield loaded


class Overheard:
    """A policy that keeps which codes its robots chose, by their seed."""

    def __init__(self, policy: EdgePolicy) -> None:
        self._policy, self.manifest = policy, policy.manifest
        self.codes: dict[int, list[tuple[int, ...]]] = {}

    def sibling(self, *, seed: int) -> Any:
        sibling, codes = self._policy.sibling(seed=seed), self.codes.setdefault(seed, [])
        act = sibling.act

        def acting(observation: dict[str, np.ndarray]) -> np.ndarray:
            action = act(observation)
            assert sibling.last is not None
            codes.append(tuple(sibling.last.codes))
            return action

        sibling.act = acting  # type: ignore[method-assign]
        return sibling


def drive(url: str, count: int, steps: int) -> list[list[np.ndarray | str]]:
    """Robots that all ask at the same time, step by step."""
    barrier = threading.Barrier(count)
    acted: list[list[np.ndarray | str]] = [[] for _ in range(count)]

    def robot(number: int) -> None:
        with open_client(url) as client:
            for seen in observations(number, steps):
                barrier.wait(SECONDS)
                acted[number].append(ask(client, {**seen, "session_id": str(number)}))

    threads = [threading.Thread(target=robot, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
    return acted


def counted(url: str, name: str) -> int:
    lines = get(url, "/metrics")[1].splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


@pytest.mark.parametrize("count", [2, 8, 11])
def test_robots_that_ask_together_act_as_if_alone(
    mini: Path, policy: EdgePolicy, backend: Backend, count: int
) -> None:
    steps, overheard = 30, Overheard(policy)
    gathering = {"vqbet-newest", "vqbet-prefill"}
    with serving(overheard, backend, max_robots=count, batch_wait_s=1.0) as server:
        assert gathering <= {thread.name for thread in threading.enumerate()}
        acted = drive(server.url, count, steps)
        runs = counted(server.url, "vqbet_shared_runs_total")
        windows = counted(server.url, "vqbet_shared_windows_total")
        assert runs > 0
        assert 2 * runs <= windows <= min(count, backend.most_together) * runs
    assert not gathering & {thread.name for thread in threading.enumerate()}
    with EdgePolicy.load(mini, "onnxruntime") as other:
        for number in range(count):
            seed = derived_seed(0, str(number))
            with other.sibling(seed=seed) as alone:
                for step, seen in enumerate(observations(number, steps)):
                    expected, action = alone.act(seen), acted[number][step]
                    assert isinstance(action, np.ndarray), action
                    assert (np.abs(action - expected) <= LIMIT).all()
                    assert alone.last is not None
                    assert overheard.codes[seed][step] == tuple(alone.last.codes)


def test_the_only_robot_acts_bitwise_as_always(
    mini: Path, policy: EdgePolicy, backend: Backend
) -> None:
    with (
        serving(policy, backend, batch_wait_s=1.0) as server,
        EdgePolicy.load(mini, "onnxruntime") as alone,
        open_client(server.url) as client,
    ):
        for seen in observations(4, 12):
            action = ask(client, seen)
            assert isinstance(action, np.ndarray)
            assert action.tobytes() == alone.act(seen).tobytes()
        assert counted(server.url, "vqbet_shared_runs_total") == 0


def test_a_shared_run_that_fails_is_run_by_each(
    policy: EdgePolicy, backend: Backend, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(policy, backend, batch_wait_s=1.0) as server:
        failed = []

        def fails(*_: object) -> None:
            failed.append(True)
            raise BackendError("no")

        monkeypatch.setattr(backend, "run_together", fails)
        acted = drive(server.url, 3, 10)
        assert failed
        assert counted(server.url, "vqbet_shared_runs_total") == 0
    with EdgePolicy.load(mini, "onnxruntime") as other:
        for number in range(3):
            with other.sibling(seed=derived_seed(0, str(number))) as alone:
                for seen, action in zip(observations(number, 10), acted[number], strict=True):
                    assert isinstance(action, np.ndarray), action
                    assert action.tobytes() == alone.act(seen).tobytes()


class Fake:
    """A backend with windows that only count."""

    shared_parts, most_together = get_args(GptRun), 4

    def __init__(self) -> None:
        self.windows: list[Any] = [None]
        self.together: list[int] = []
        self.run_shared: Any = None

    def create_window(self) -> Any:
        return FakeWindow()

    def run_together(self, part: str, windows: list[Any]) -> None:
        del part
        self.together.append(len(windows))
        if any(window.broken for window in windows):
            raise BackendError("one of them is broken")


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


def gathered(fake: Fake, windows: list[Any], wait_s: float) -> list[str]:
    """Windows of robots that act at the same time; what each raised."""
    fake.windows += windows
    gatherer = Gatherer(fake, wait_s, lambda _: None)  # type: ignore[arg-type]
    fake.together.clear()
    errors = [""] * len(windows)
    barrier = threading.Barrier(len(windows))

    def act(number: int) -> None:
        with gatherer.step():
            barrier.wait(SECONDS)
            try:
                fake.run_shared(windows[number], "newest")
            except BackendError as error:
                errors[number] = str(error)

    threads = [threading.Thread(target=act, args=(i,)) for i in range(len(windows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    gatherer.close()
    assert fake.run_shared is None
    return errors


def test_only_the_robot_at_fault_fails() -> None:
    windows = [FakeWindow(), FakeWindow(broken=True), FakeWindow()]
    assert gathered(Fake(), windows, 1000.0) == ["", "broken", ""]
    assert [window.alone for window in windows] == [1, 1, 1]


def test_nobody_waits_when_all_who_act_are_there() -> None:
    """The time limit would never come."""
    fake = Fake()
    assert gathered(fake, [FakeWindow() for _ in range(4)], 1000.0) == [""] * 4
    assert fake.together == [4]


def test_a_robot_waits_for_nobody_who_does_not_act() -> None:
    fake, window = Fake(), FakeWindow()
    fake.windows += [window, FakeWindow(), FakeWindow()]
    gatherer = Gatherer(fake, 1000.0, lambda _: None)  # type: ignore[arg-type]
    with gatherer.step():
        fake.run_shared(window, "newest")
    gatherer.close()
    assert window.alone == 1


def test_who_waits_when_the_server_stops_is_run() -> None:
    fake, window = Fake(), FakeWindow()
    fake.windows += [window, FakeWindow()]
    gatherer = Gatherer(fake, 1000.0, lambda _: None)  # type: ignore[arg-type]
    thread = threading.Thread(target=fake.run_shared, args=(window, "prefill"))
    thread.start()
    end = time.monotonic() + SECONDS
    while not gatherer._waiting["prefill"] and time.monotonic() < end:
        time.sleep(0.001)
    gatherer.close()
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
