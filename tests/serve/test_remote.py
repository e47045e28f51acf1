"""`RemotePolicy`: late, lost or refused, the robot gets the right action or an error, in time."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import miniature
import msgspec
import numpy as np
import pytest
from serve.serving import (
    SECONDS,
    STALLING,
    Seen,
    Stalling,
    get,
    observations,
    serving,
    serving_process,
    until,
    vanish,
)
from torture import cases
from vqbet_serve import RemotePolicy
from vqbet_serve.frames import pack
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


def remote(url: str, **options: Any) -> RemotePolicy:
    return RemotePolicy(url, **{"guards": PATIENT, **options})


@contextmanager
def pair(
    policy: EdgePolicy, served: Any = None, **options: Any
) -> Iterator[tuple[RemotePolicy, EdgePolicy]]:
    """A robot of a server, and the policy that it should act as."""
    with ExitStack() as stack:
        server = stack.enter_context(serving(served or policy))
        local = stack.enter_context(policy.sibling())
        yield stack.enter_context(remote(server.url, **options)), local


def same(robot: RemotePolicy, local: EdgePolicy, seen: list[Seen]) -> None:
    """However late, each action is the policy's."""
    limit, robot._deadline_s = robot._deadline_s, SECONDS
    for each in seen:
        np.testing.assert_array_equal(robot.act(each), local.act(each))
    robot._deadline_s = limit


@pytest.mark.parametrize("guards", [Guards(), Guards(deadline_s=0.1, on_late="continue")])
def test_a_time_limit_is_required(guards: Guards) -> None:
    with pytest.raises(UsageError, match="a network can always be late"):
        RemotePolicy("ws://127.0.0.1:1", guards=guards)


@pytest.mark.parametrize("url", ["ws://127.0.0.1:1", "http://127.0.0.1:1", ""])
def test_no_server(url: str) -> None:
    with pytest.raises(BackendError, match=f"'{url}' cannot be used"):
        remote(url)


def test_what_the_server_says(policy: EdgePolicy) -> None:
    with pair(policy) as (robot, _):
        said = robot.metadata
    image, state = Feature("uint8", (24, 24, 3)), Feature("float32", (2,))
    assert said.observation == {miniature.IMAGE: image, miniature.STATE: state}
    assert (said.action_dim, said.action_horizon, said.query) == (2, 1, "every_step")
    assert (said.n_obs_steps, robot.fps) == (policy.manifest.policy.n_obs_steps, policy.fps)


def test_observations_that_do_not_fit_leave_the_history(policy: EdgePolicy) -> None:
    """Found on the robot or by the server."""
    image, state = miniature.IMAGE, miniature.STATE
    wrong: list[tuple[str, Any, str]] = [
        (image, None, "is None"),
        (image, np.zeros((480, 640, 3), np.uint8), r"got uint8 \(480, 640, 3\)"),
        (image, np.zeros((24, 24, 3), np.float32), r"got float32 \(24, 24, 3\)"),
        (state, np.zeros(2, ">f4"), "got >f4"),
        (state, np.array([np.inf, 0], np.float32), "expected finite values"),
    ]
    with pair(policy) as (robot, local):
        for seen in observations(4, 12):
            for key, value, error in wrong:
                with pytest.raises(ObservationError, match=error):
                    robot.act({**seen, key: value})
            # And another form, and what nobody looks at.
            planar = np.moveaxis(seen[image], -1, 0).astype(np.float32) / 255
            form = {image: planar[None], state: seen[state].astype(float)[None]}
            np.testing.assert_array_equal(robot.act({**form, "other": object()}), local.act(form))
        assert 'refusals_total{reason="ObservationError"} 24' in get(robot._url, "/metrics")[1]


def test_guards_hold_on_the_robot(policy: EdgePolicy) -> None:
    limits, change = (-0.5, 12.0), 0.25
    guards = Guards(
        deadline_s=SECONDS, on_late="raise", action_limits=limits, max_change=change, max_age_s=0.2
    )
    with pair(policy, guards=guards) as (robot, local):
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
            remote(robot._url, guards=Guards(deadline_s=1, on_late="raise", max_change=[1, 2, 3]))


def test_limits_on_change_hold_on_the_first_action(policy: EdgePolicy) -> None:
    """As of `EdgePolicy.reset`; after a lost connection too, where the episode goes on."""
    guards = Guards(deadline_s=SECONDS, on_late="raise", max_change=0.25, action_limits=None)
    seen = observations(4, 1)
    with pair(policy, guards=guards) as (robot, local):
        for _ in range(2):
            start = local.act(seen[0]) + np.float32(1)
            local.reset(seed=0)
            robot.reset(0, from_action=start)
            np.testing.assert_array_equal(robot.act(seen[0]), start - np.float32(0.25))
            vanish(robot._link._connection)
        for wrong in ([0.0], [0.0, np.nan], "up"):
            with pytest.raises(UsageError, match="expected from_action of 2 finite numbers"):
                robot.reset(from_action=wrong)
        robot.reset(0)
        same(robot, local, seen)


def late(robot: RemotePolicy, observation: Seen, limit: float) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=f"within {limit} s; stop the robot"):
        robot.act(observation)
    assert limit <= time.monotonic() - start < limit + SLACK


@pytest.mark.parametrize("on_late", ["raise", "hold"])
def test_a_stalled_server(policy: EdgePolicy, on_late: Any) -> None:
    """Late answers are replaced on the robot, observations meanwhile dropped, never queued.

    A camera's driver writes the next frame into the same arrays meanwhile.
    """
    stalling, limit = Stalling(policy), 0.05
    seen = observations(3, 10)
    guards = Guards(deadline_s=limit, on_late=on_late)
    with pair(policy, stalling, guards=guards) as (robot, local):
        same(robot, local, seen[:1])
        last, reused = robot._handed, {key: value.copy() for key, value in STALLING.items()}
        for each in [reused, *seen[1:4]]:
            if on_late == "hold":
                np.testing.assert_array_equal(robot.act(each), last)
            else:
                late(robot, each, limit)
            for value in reused.values():
                value[...] = 0
        assert robot.guard_counts.late == 4
        assert robot.dropped == 3
        stalling.go.set()
        assert robot._job is not None
        assert robot._job.done(SECONDS)
        # The server has seen the first, the stalling one and none of the dropped.
        local.act(STALLING)
        same(robot, local, seen[5:])


def test_a_server_that_is_silent_for_a_whole_chunk_is_lost(policy: EdgePolicy) -> None:
    """And there is nothing to hold on the first step."""
    stalling, limit = Stalling(policy), 0.02
    with pair(policy, stalling, guards=Guards(deadline_s=limit, on_late="hold")) as (robot, local):
        late(robot, STALLING, limit)
        for _ in range(robot.metadata.action_chunk_size - 1):
            late(robot, STALLING, limit)
        for _ in range(2):
            with pytest.raises(HistoryError, match="no answer to 5 calls"):
                robot.act(STALLING)
        stalling.go.set()
        robot.reset()
        same(robot, local, [STALLING])


def test_reset_while_the_server_stalls_takes_a_new_connection(policy: EdgePolicy) -> None:
    stalling, limit = Stalling(policy), 0.05
    with pair(policy, stalling, guards=Guards(deadline_s=limit, on_late="raise")) as (robot, local):
        late(robot, STALLING, limit)
        robot.reset()
        same(robot, local, observations(5, 10))
        stalling.go.set()


def test_two_calls_at_once(policy: EdgePolicy) -> None:
    stalling = Stalling(policy)
    with pair(policy, stalling) as (robot, _), stalling.held(lambda: robot.act(STALLING)):
        with pytest.raises(ConcurrentUseError):
            robot.act(STALLING)
        with pytest.raises(ConcurrentUseError):
            robot.reset()


@pytest.mark.parametrize("on_late", ["raise", "hold"])
def test_the_server_is_killed_in_mid_episode(mini: Path, on_late: Any) -> None:
    """At a random moment: within its limit every call acts, holds or raises; then history is lost."""
    random, limit = np.random.default_rng(31), 0.5
    for round_ in range(cases(1, 30)):
        with serving_process(mini) as (process, url):
            robot = remote(url, guards=Guards(deadline_s=limit, on_late=on_late), connect_s=0.5)
            killer = threading.Timer(random.uniform(0, 0.3), process.kill)
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
            with pytest.raises(HistoryError, match=r"stop the robot and call reset\(\)"):
                robot.act(seen)
            with pytest.raises(BackendError, match="cannot be used"):
                robot.reset()
            with pytest.raises(HistoryError):
                robot.act(seen)
            killer.join()


def test_a_frozen_server(mini: Path) -> None:
    """It takes the bytes and never answers, until its buffers are full and `send` hangs too."""
    limit, guards = 0.05, Guards(deadline_s=0.05, on_late="hold")
    with serving_process(mini) as (process, url), remote(url, guards=guards, connect_s=1) as robot:
        robot._deadline_s = SECONDS
        held = robot.act(observations(0, 1)[0])
        robot._deadline_s = limit
        os.kill(process.pid, signal.SIGSTOP)
        # More than all buffers hold, so that `send` hangs.
        robot._job = hanging = robot._link.ask(bytes(1 << 26))
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
    """And no thread of the lost ones is left."""
    seen = observations(6, 6)
    with pair(policy, session_id=None) as (robot, local):
        for _ in range(6):
            same(robot, local, seen)
            vanish(robot._link._connection)
            for each in seen[:2]:
                with pytest.raises(HistoryError):
                    robot.act(each)
            robot.reset()
            local.reset(seed=0)
        until(lambda: [each.name for each in threading.enumerate()].count("vqbet-remote") == 1)


def test_a_server_that_now_serves_another_robot(policy: EdgePolicy) -> None:
    with pair(policy) as (robot, _), lying("reset successful") as url:
        robot._url = url
        robot._link.close()
        with pytest.raises(BackendError, match="a policy for another robot"):
            robot.reset()


GREETING = PolicyMetadata(
    "vqbet", "s", "c", {miniature.STATE: Feature("float32", (2,))}, 2, 1, 5, 5, "every_step"
)
NOWHERE = {miniature.STATE: np.zeros(2, np.float32)}


def saying(**changes: Any) -> bytes:
    """A server's metadata with something else in it."""
    return msgspec.msgpack.encode(msgspec.to_builtins(GREETING) | changes)


def watching(features: int = 1, **of: Any) -> bytes:
    seen = {"dtype": "uint8", "shape": [1]} | of
    return saying(observation={str(key): seen for key in range(features)})


@contextmanager
def lying(answer: Any, greeting: bytes | str | None = None) -> Iterator[str]:
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


def acting(actions: Any) -> bytes:
    return pack({"actions": actions})


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x80",
        acting("none"),
        acting(np.zeros((2, 2), np.float32)),
        acting(np.zeros((1, 2))),
        acting(np.array([[np.nan, 0]], np.float32)),
        acting(np.array([[np.inf, 0]], np.float32)),
        bytes(1 << 21),
        "HistoryError: something failed",
        [b""] * 200,  # fragments
    ],
    ids=lambda value: str(value)[:40],
)
def test_answers_that_are_no_actions(answer: Any) -> None:
    with lying(answer) as url, remote(url) as robot:
        for _ in range(2):
            with pytest.raises(HistoryError, match="is lost"):
                robot.act(NOWHERE)
        with pytest.raises(BackendError):
            robot.reset()


@pytest.mark.parametrize(
    "greeting",
    [
        "\x1b[2J" + "x" * 900_000,
        b"",
        pack({"policy": "pi0"}),
        bytes(1 << 21),
        saying(action_dim=10**12),
        saying(action_chunk_size=10**12),
        saying(n_obs_steps=1 << 62),
        saying(fps=0),
        saying(fps=float("nan")),
        saying(policy="p" * 5000),
        saying(server="\x1b[2J"),
        watching(65),
        watching(dtype="object"),
        watching(shape=[1 << 40]),
        watching(shape=[1] * 64),
    ],
    ids=lambda value: str(value)[:40],
)
def test_servers_of_another_kind(greeting: bytes | str) -> None:
    """What they say is cut, and shown without control characters."""
    limited = Guards(deadline_s=SECONDS, on_late="raise", action_limits=(-1, 1), max_change=1)
    with (
        lying(b"", greeting) as url,
        pytest.raises(BackendError, match="cannot be used") as refused,
    ):
        remote(url, guards=limited)
    assert len(str(refused.value)) < 2000
    assert str(refused.value).isprintable()
