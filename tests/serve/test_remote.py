"""`RemotePolicy`: late, lost or refused, the robot gets the right action or an error, in time."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import miniature
import msgspec
import numpy as np
import pytest
from serve.serving import SECONDS, Stalling, observations, serving, serving_process, vanish
from torture import cases
from vqbet_serve import RemotePolicy
from vqbet_serve.frames import pack
from vqbet_serve.keys import Keys
from vqbet_serve.metadata import Feature, PolicyMetadata
from websockets.sync.server import ServerConnection, serve

from vqbet_edge import (
    BackendError,
    ConcurrentUseError,
    DeadlineError,
    EdgePolicy,
    Guards,
    HistoryError,
    ObservationError,
    StaleObservationError,
    UsageError,
)

PATIENT = Guards(deadline_s=SECONDS, on_late="raise")
# What a call may take beyond its limit on a machine that does other things too.
SLACK = 5.0
STALLING = {**observations(0, 1)[0], miniature.STATE: miniature.LOW}


def remote(url: str, **options: Any) -> RemotePolicy:
    return RemotePolicy(url, **{"guards": PATIENT, **options})


@pytest.mark.parametrize(
    "guards", [Guards(), Guards(deadline_s=0.1, on_late="continue")], ids=["none", "continue"]
)
def test_a_time_limit_is_required(guards: Guards) -> None:
    with pytest.raises(UsageError, match="a network can always be late"):
        RemotePolicy("ws://127.0.0.1:1", guards=guards)


@pytest.mark.parametrize("url", ["ws://127.0.0.1:1", "http://127.0.0.1:1", "nonsense", ""])
def test_no_server(url: str) -> None:
    with pytest.raises(BackendError, match=f"'{url}' cannot be used"):
        remote(url)


def test_a_wrong_key(policy: EdgePolicy) -> None:
    key = "0123456789abcdef"
    with serving(policy, keys=Keys(key)) as server:
        for wrong in (None, "fedcba9876543210"):
            with pytest.raises(BackendError, match="401"):
                remote(server.url, api_key=wrong)
        with remote(server.url, api_key=key) as robot:
            assert robot.act(observations(0, 1)[0]).shape == (2,)


def test_what_the_server_says(policy: EdgePolicy) -> None:
    with serving(policy) as server, remote(server.url) as robot:
        said = robot.metadata
        assert robot.fps == policy.manifest.fps
    assert said.observation == {
        miniature.IMAGE: Feature("uint8", (24, 24, 3)),
        miniature.STATE: Feature("float32", (2,)),
    }
    assert (said.action_dim, said.action_horizon, said.query) == (2, 1, "every_step")
    assert said.n_obs_steps == policy.manifest.policy.n_obs_steps


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({miniature.IMAGE: None}, "is None"),
        ({miniature.IMAGE: [1, 2]}, "expected a NumPy array"),
        ({miniature.IMAGE: np.zeros((480, 640, 3), np.uint8)}, r"got uint8 \(480, 640, 3\)"),
        ({miniature.IMAGE: np.zeros((24, 24, 3), object)}, "got object"),
        ({miniature.IMAGE: np.zeros((24, 24, 3), np.float32)}, r"got float32 \(24, 24, 3\)"),
        ({miniature.STATE: np.zeros(2, ">f4")}, "got >f4"),
        ({miniature.STATE: np.array([np.inf, 0], np.float32)}, "expected finite values"),
        ({miniature.STATE: np.ma.masked_array(np.zeros(2, np.float32), [True, False])}, "masked"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_observations_that_do_not_fit(
    policy: EdgePolicy, change: dict[str, Any], error: str
) -> None:
    seen = observations(4, 12)
    with (
        serving(policy) as server,
        policy.sibling() as local,
        remote(server.url) as robot,
    ):
        for each in seen:
            with pytest.raises(ObservationError, match=error):
                robot.act({**each, **change})
            np.testing.assert_array_equal(robot.act(each), local.act(each))


def test_every_form_of_an_observation(policy: EdgePolicy) -> None:
    with serving(policy) as server, policy.sibling() as local, remote(server.url) as robot:
        for each in observations(4, 12):
            image, state = each[miniature.IMAGE], each[miniature.STATE]
            planar = np.moveaxis(image, -1, 0).astype(np.float32) / 255
            form = {miniature.IMAGE: planar[None], miniature.STATE: state.astype(float)[None]}
            np.testing.assert_array_equal(robot.act({**form, "unknown": object()}), local.act(form))


def test_guards_hold_on_the_robot(policy: EdgePolicy) -> None:
    limits, change = (-0.5, 12.0), 0.25
    guards = Guards(
        deadline_s=SECONDS, on_late="raise", action_limits=limits, max_change=change, max_age_s=0.2
    )
    with (
        serving(policy) as server,
        policy.sibling() as local,
        remote(server.url, guards=guards) as robot,
    ):
        before: np.ndarray | None = None
        for each in observations(4, 20):
            expected = np.clip(local.act(each), *limits)
            if before is not None:
                expected = np.clip(expected, before - change, before + change)
            before = robot.act(each, time.monotonic())
            np.testing.assert_array_equal(before, expected)
        assert robot.guard_counts.clamped == 20
        assert robot.guard_counts.slowed > 0
        with pytest.raises(StaleObservationError, match="s old"):
            robot.act(each, time.monotonic() - 1)
        with pytest.raises(StaleObservationError, match="missing"):
            robot.act(each)
        with pytest.raises(UsageError, match="max_change of one number or 2"):
            remote(server.url, guards=Guards(deadline_s=1, on_late="raise", max_change=[1, 2, 3]))


def test_the_callers_arrays_are_its_own(policy: EdgePolicy) -> None:
    """A camera's driver writes the next frame into the same array while the answer is late."""
    stalling = Stalling(policy)
    guards = Guards(deadline_s=0.2, on_late="raise")
    reused = {key: value.copy() for key, value in STALLING.items()}
    with (
        serving(stalling) as server,
        policy.sibling() as local,
        remote(server.url, guards=guards) as robot,
    ):
        with pytest.raises(DeadlineError):
            robot.act(reused)
        for value in reused.values():
            value[...] = 0
        stalling.go.set()
        expected = [local.act(STALLING), *(local.act(each) for each in observations(1, 9))]
        wait_for_answer(robot)
        for each, action in zip(observations(1, 9), expected[1:], strict=True):
            np.testing.assert_array_equal(robot.act(each), action)


def wait_for_answer(robot: RemotePolicy) -> None:
    assert robot._job is not None
    assert robot._job.done(SECONDS)


@pytest.mark.parametrize("on_late", ["raise", "hold"])
def test_a_stalled_server(policy: EdgePolicy, on_late: Any) -> None:
    """Late answers are replaced on the robot, observations meanwhile dropped, never queued."""
    stalling, limit = Stalling(policy), 0.1
    seen = observations(3, 10)
    with (
        serving(stalling) as server,
        policy.sibling() as local,
        remote(server.url, guards=Guards(deadline_s=limit, on_late=on_late)) as robot,
    ):
        robot._deadline_s = SECONDS  # the steps that nothing stalls may take long
        last = robot.act(seen[0])
        np.testing.assert_array_equal(last, local.act(seen[0]))
        robot._deadline_s = limit
        for each in [STALLING, *seen[1:5]]:
            start = time.monotonic()
            if on_late == "hold":
                np.testing.assert_array_equal(robot.act(each), last)
            else:
                with pytest.raises(DeadlineError, match=f"within {limit} s; stop the robot"):
                    robot.act(each)
            assert limit <= time.monotonic() - start < limit + SLACK
        assert robot.guard_counts.late == 5
        assert robot.dropped == 4
        stalling.go.set()
        wait_for_answer(robot)
        robot._deadline_s = SECONDS
        # The server has seen the first, the stalling one and none of the dropped.
        local.act(STALLING)
        for each in seen[6:]:
            np.testing.assert_array_equal(robot.act(each), local.act(each))


def test_a_server_that_is_silent_for_a_whole_chunk_is_lost(policy: EdgePolicy) -> None:
    stalling, guards = Stalling(policy), Guards(deadline_s=0.02, on_late="hold")
    with serving(stalling) as server, remote(server.url, guards=guards) as robot:
        robot._deadline_s = SECONDS
        held = robot.act(observations(0, 1)[0])
        robot._deadline_s = 0.02
        for _ in range(robot.metadata.action_chunk_size):
            np.testing.assert_array_equal(robot.act(STALLING), held)
        for _ in range(2):
            with pytest.raises(HistoryError, match="no answer to 5 calls"):
                robot.act(STALLING)
        stalling.go.set()
        robot.reset()
        robot._deadline_s = SECONDS
        assert robot.act(STALLING).shape == (2,)


def test_reset_while_the_server_stalls_takes_a_new_connection(policy: EdgePolicy) -> None:
    stalling = Stalling(policy)
    with (
        serving(stalling) as server,
        policy.sibling() as local,
        remote(server.url, guards=Guards(deadline_s=0.1, on_late="raise")) as robot,
    ):
        with pytest.raises(DeadlineError):
            robot.act(STALLING)
        robot.reset()
        robot._deadline_s = SECONDS
        for each in observations(5, 10):
            np.testing.assert_array_equal(robot.act(each), local.act(each))
        stalling.go.set()


def test_nothing_to_hold_on_the_first_step(policy: EdgePolicy) -> None:
    stalling = Stalling(policy)
    with (
        serving(stalling) as server,
        remote(server.url, guards=Guards(deadline_s=0.1, on_late="hold")) as robot,
    ):
        with pytest.raises(DeadlineError):
            robot.act(STALLING)
        stalling.go.set()


@pytest.mark.parametrize("on_late", ["raise", "hold"])
def test_the_server_is_killed_in_mid_episode(mini: Path, on_late: Any) -> None:
    """At a random moment: within its limit every call acts, holds or raises; then history is lost."""
    random = np.random.default_rng(31)
    limit = 0.5
    for round_ in range(cases(2, 30)):
        with serving_process(mini) as (process, url):
            robot = remote(url, guards=Guards(deadline_s=limit, on_late=on_late), connect_s=0.5)
            delay = random.uniform(0, 0.3)
            killer = threading.Timer(delay, process.kill)
            killer.start()
            seen, end = observations(round_, 1)[0], time.monotonic() + SECONDS
            while True:
                start = time.monotonic()
                assert start < end
                try:
                    assert np.isfinite(robot.act(seen)).all()
                except HistoryError as error:
                    assert "lost" in str(error)  # noqa: PT017 - other outcomes are allowed before
                    break
                except DeadlineError:
                    assert on_late == "raise" or robot._handed is None
                finally:
                    assert time.monotonic() - start < limit + SLACK
            for _ in range(3):
                with pytest.raises(HistoryError, match=r"stop the robot and call reset\(\)"):
                    robot.act(seen)
            with pytest.raises(BackendError, match="cannot be used"):
                robot.reset()
            with pytest.raises(HistoryError):
                robot.act(seen)
            killer.join()


def test_a_frozen_server(mini: Path) -> None:
    """It takes the bytes and never answers, until its buffers are full and `send` hangs too."""
    limit = 0.05
    with serving_process(mini) as (process, url):
        guards = Guards(deadline_s=limit, on_late="hold")
        with remote(url, guards=guards, connect_s=1.0) as robot:
            robot._deadline_s = SECONDS
            held = robot.act(observations(0, 1)[0])
            robot._deadline_s = limit
            os.kill(process.pid, signal.SIGSTOP)
            # More than all buffers hold, so that `send` hangs.
            hanging = robot._link.ask(bytes(1 << 26))
            robot._job = hanging
            for seen in observations(1, 4):
                start = time.monotonic()
                np.testing.assert_array_equal(robot.act(seen), held)
                assert time.monotonic() - start < limit + SLACK
            start = time.monotonic()
            with pytest.raises(BackendError):
                robot.reset()
            assert time.monotonic() - start < 1.0 + SLACK
            assert hanging.done(SECONDS)
            with pytest.raises(HistoryError):
                robot.act(observations(0, 1)[0])


def test_after_a_lost_connection_reset_begins_anew(policy: EdgePolicy) -> None:
    seen = observations(6, 12)
    with serving(policy) as server, policy.sibling() as local, remote(server.url) as robot:
        for each in seen[:5]:
            robot.act(each)
        vanish(robot._link._connection)
        with pytest.raises(HistoryError):
            robot.act(seen[5])
        with pytest.raises(HistoryError):
            robot.act(seen[6])
        robot.reset()
        for each in seen:
            np.testing.assert_array_equal(robot.act(each), local.act(each))


def test_reconnecting_leaves_no_threads(policy: EdgePolicy) -> None:
    with serving(policy) as server, remote(server.url, session_id="arm") as robot:
        for _ in range(12):
            robot.act(observations(0, 1)[0])
            vanish(robot._link._connection)
            robot.reset()
        end = time.monotonic() + SECONDS
        while sum(thread.name == "vqbet-remote" for thread in threading.enumerate()) > 1:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert sum(thread.name == "vqbet-remote" for thread in threading.enumerate()) == 1


def test_two_calls_at_once(policy: EdgePolicy) -> None:
    stalling = Stalling(policy)
    with serving(stalling) as server, remote(server.url) as robot:
        thread = threading.Thread(target=robot.act, args=(STALLING,))
        thread.start()
        assert stalling.stalled.wait(SECONDS)
        with pytest.raises(ConcurrentUseError):
            robot.act(STALLING)
        with pytest.raises(ConcurrentUseError):
            robot.reset()
        stalling.go.set()
        thread.join(SECONDS)


GREETING = PolicyMetadata(
    "vqbet", "s", "c", {miniature.STATE: Feature("float32", (2,))}, 2, 1, 5, 5, "every_step"
)


def saying(**changes: Any) -> bytes:
    """A server's metadata with something else in it."""
    return msgspec.msgpack.encode(msgspec.to_builtins(GREETING) | changes)


@contextmanager
def lying(answer: bytes | str, greeting: bytes | str | None = None) -> Iterator[str]:
    """A server that answers everything by the same."""

    def handle(connection: ServerConnection) -> None:
        connection.send(GREETING.to_frame() if greeting is None else greeting)
        for _ in connection:
            connection.send(answer)

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join(SECONDS)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x80",
        pack({"actions": "none"}),
        pack({"actions": np.zeros((1, 3), np.float32)}),
        pack({"actions": np.zeros((2, 2), np.float32)}),
        pack({"actions": np.zeros(2, np.float32)}),
        pack({"actions": np.zeros((1, 2))}),
        pack({"actions": np.zeros((1, 2), np.uint8)}),
        pack({"actions": np.array([[np.nan, 0]], np.float32)}),
        pack({"actions": np.array([[np.inf, 0]], np.float32)}),
        pack(np.zeros((1, 2), np.float32)),
        bytes(1 << 21),
        "HistoryError: something failed",
        "",
    ],
    ids=lambda value: str(value)[:40],
)
def test_answers_that_are_no_actions(answer: bytes | str) -> None:
    seen = {miniature.STATE: np.zeros(2, np.float32)}
    with lying(answer) as url, remote(url) as robot:
        for _ in range(2):
            with pytest.raises(HistoryError, match="is lost"):
                robot.act(seen)
        with pytest.raises(BackendError):
            robot.reset()


@pytest.mark.parametrize(
    "greeting",
    [
        "an error",
        b"",
        pack({"policy": "pi0"}),
        pack({"action_dim": "2"}),
        bytes(1 << 21),
        saying(action_dim=10**12),
        saying(action_chunk_size=10**12),
        saying(n_obs_steps=1 << 62),
        saying(fps=0),
        saying(fps=float("nan")),
        saying(fps=float("inf")),
        saying(policy="p" * 5000),
        saying(server="\x1b[2J"),
        saying(observation={str(key): {"dtype": "uint8", "shape": [1]} for key in range(65)}),
        saying(observation={"x": {"dtype": "object", "shape": [1]}}),
        saying(observation={"x": {"dtype": "uint8", "shape": [1 << 40]}}),
        saying(observation={"x": {"dtype": "uint8", "shape": [1] * 64}}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_servers_of_another_kind(greeting: bytes | str) -> None:
    limited = Guards(deadline_s=SECONDS, on_late="raise", action_limits=(-1, 1), max_change=1)
    with lying(b"", greeting) as url, pytest.raises(BackendError, match="cannot be used"):
        remote(url, guards=limited)


def test_a_servers_text_is_short_and_can_be_shown() -> None:
    with lying(b"", "\x1b[2J" + "x" * 900_000) as url, pytest.raises(BackendError) as refused:
        remote(url)
    assert len(str(refused.value)) < 2000
    assert str(refused.value).isprintable()


def test_a_servers_flood_of_empty_fragments() -> None:
    with (
        lying([b""] * 200) as url,  # type: ignore[arg-type]
        remote(url) as robot,
        pytest.raises(HistoryError, match="expected a frame in 64 fragments at most"),
    ):
        robot.act({miniature.STATE: np.zeros(2, np.float32)})


def test_limits_on_change_hold_on_the_first_action(policy: EdgePolicy) -> None:
    """As of `EdgePolicy.reset`; after a lost connection too, where the episode goes on."""
    guards = Guards(deadline_s=SECONDS, on_late="raise", max_change=0.25, action_limits=None)
    seen = observations(4, 3)
    with (
        serving(policy) as server,
        policy.sibling() as local,
        remote(server.url, guards=guards) as robot,
    ):
        for _ in range(2):
            start = local.act(seen[0]) + np.float32(1)
            local.reset(seed=0)
            robot.reset(0, from_action=start)
            np.testing.assert_array_equal(robot.act(seen[0]), start - np.float32(0.25))
            vanish(robot._link._connection)
            local.reset(seed=0)
        for wrong in ([0.0], [0.0, np.nan], "up"):
            with pytest.raises(UsageError, match="expected from_action of 2 finite numbers"):
                robot.reset(from_action=wrong)
        robot.reset(0)
        np.testing.assert_array_equal(robot.act(seen[0]), local.act(seen[0]))


def test_a_server_that_now_serves_another_robot(policy: EdgePolicy) -> None:
    with serving(policy) as server, remote(server.url) as robot, lying("reset successful") as url:
        robot._url = url
        robot._link.close()
        with pytest.raises(BackendError, match="a policy for another robot"):
            robot.reset()
