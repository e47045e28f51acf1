"""Existing clients drive PushT through the server, bitwise as the policy in this process."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gymnasium
import miniature
import numpy as np
import pytest
from serve.serving import serving
from vqbet_serve import RemotePolicy
from vqbet_serve.sessions import derived_seed

from vqbet_edge import EdgePolicy, Guards

PEER = Path(__file__).with_name("openpi_peer.py")
STEPS = 30
Act = Callable[[dict[str, np.ndarray]], np.ndarray]


@contextmanager
def peer(python: str, kind: str, url: str) -> Iterator[tuple[Act, Callable[[], None]]]:
    """`act` and `reset` of a client in another process."""
    command = [python, str(PEER), kind, url, str(miniature.SIZE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env={}) as process:  # type: ignore[call-overload]

        def exchange(message: bytes, size: int) -> bytes:
            process.stdin.write(message)
            process.stdin.flush()
            answer: bytes = process.stdout.read(size)
            return answer

        def act(observation: dict[str, np.ndarray]) -> np.ndarray:
            image, state = observation[miniature.IMAGE], observation[miniature.STATE]
            return np.frombuffer(exchange(b"a" + image.tobytes() + state.tobytes(), 8), np.float32)

        def reset() -> None:
            assert exchange(b"r", 1) == b"r"

        yield act, reset
        process.stdin.close()
        assert process.wait(20) == 0


def drive(act: Act, local: EdgePolicy, seed: int) -> int:
    """An episode of PushT; how many different actions were seen."""
    import gym_pusht  # noqa: F401 - registers itself

    side = miniature.SIZE
    env = gymnasium.make(
        "gym_pusht/PushT-v0",
        obs_type="pixels_agent_pos",
        observation_width=side,
        observation_height=side,
    )
    seen, _ = env.reset(seed=seed)
    actions = set()
    for _ in range(STEPS):
        observation = {
            miniature.IMAGE: seen["pixels"],
            miniature.STATE: np.asarray(seen["agent_pos"], np.float32),
        }
        action = act(observation)
        assert action.dtype == np.float32
        assert action.tobytes() == local.act(observation).tobytes()
        actions.add(action.tobytes())
        seen, *_ = env.step(action.astype(np.float64))
    env.close()
    return len(actions)


def test_openpi_client(policy: EdgePolicy, openpi_python: str) -> None:
    with serving(policy, seed=7) as server, policy.sibling(seed=7) as local:
        with peer(openpi_python, "openpi", server.url) as (act, _):
            assert drive(act, local, 1) > 5
        # A new connection is a new robot.
        local.reset(seed=7)
        with peer(openpi_python, "openpi", server.url) as (act, _):
            drive(act, local, 2)


def test_roboarena_client(policy: EdgePolicy, openpi_python: str) -> None:
    with (
        serving(policy, seed=7) as server,
        policy.sibling(seed=derived_seed(7, "arm-1")) as local,
        peer(openpi_python, "roboarena", server.url) as (act, reset),
    ):
        for episode in range(2):
            reset()
            local.reset()
            assert drive(act, local, episode) > 5


@pytest.mark.parametrize("name", [None, "arm-2"])
def test_remote_policy(policy: EdgePolicy, name: str | None) -> None:
    seed = 7 if name is None else derived_seed(7, name)
    guards = Guards(deadline_s=20, on_late="raise")
    with (
        serving(policy, seed=7) as server,
        policy.sibling(seed=seed) as local,
        RemotePolicy(server.url, guards=guards, session_id=name) as remote,
    ):
        assert drive(remote.act, local, 1) > 5
        for start in (None, 3):
            remote.reset(start)
            local.reset(start)
            drive(remote.act, local, 2)


def test_frames_are_those_of_openpi(openpi_python: str) -> None:
    from vqbet_serve.frames import pack

    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    message = {"image": image, "state": np.array([1.5, -2], np.float32), "deep": {"n": 1, "t": "x"}}
    code = """
import sys, numpy as np
from openpi_client import msgpack_numpy
image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
message = {"image": image, "state": np.array([1.5, -2], np.float32), "deep": {"n": 1, "t": "x"}}
sys.stdout.buffer.write(msgpack_numpy.packb(message))
"""
    done = subprocess.run([openpi_python, "-c", code], capture_output=True, check=True, env={})
    assert pack(message) == done.stdout
