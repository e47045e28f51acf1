"""Existing clients drive PushT through the server, bitwise as the policy in this process."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import miniature
import numpy as np
import pytest
from serve.serving import observations, serving
from vqbet_serve import RemotePolicy
from vqbet_serve.sessions import derived_seed

from vqbet_edge import EdgePolicy, Guards

PEER = Path(__file__).with_name("openpi_peer.py")
STEPS = 30
Act = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Peer:
    """A client in another process."""

    process: "subprocess.Popen[bytes]"

    def _exchange(self, message: bytes, size: int) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(message)
        self.process.stdin.flush()
        return self.process.stdout.read(size)

    def act(self, observation: dict[str, np.ndarray], **further: list[int]) -> np.ndarray:
        """With uint8 frames of further shapes, or instead of the observation's own."""
        image, state = observation[miniature.IMAGE], observation[miniature.STATE]
        shapes = b"f" + json.dumps(further).encode() + b"\n" if further else b""
        packed = shapes + b"a" + image.tobytes() + state.tobytes()
        answer = np.frombuffer(self._exchange(packed, 8), np.float32)
        if further and answer[0] < 0 and answer[1] == 0:
            raise RuntimeError(self._exchange(b"", int(-answer[0])).decode())
        return answer

    def reset(self) -> None:
        assert self._exchange(b"r", 1) == b"r"


@contextmanager
def peer(python: str, kind: str, url: str) -> Iterator[Peer]:
    """A client in another process."""
    command = [python, str(PEER), kind, url, str(miniature.SIZE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env={}) as process:  # type: ignore[call-overload]
        yield Peer(process)
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


@pytest.mark.parametrize("kind", ["openpi", "msgpack_numpy"])
def test_openpi_client(policy: EdgePolicy, openpi_python: str, kind: str) -> None:
    with serving(policy, seed=7) as server, policy.sibling(seed=7) as local:
        with peer(openpi_python, kind, server.url) as robot:
            assert drive(robot.act, local, 1) > 5
        # A new connection is a new robot.
        local.reset(seed=7)
        with peer(openpi_python, kind, server.url) as robot:
            drive(robot.act, local, 2)


def test_roboarena_client(policy: EdgePolicy, openpi_python: str) -> None:
    with (
        serving(policy, seed=7) as server,
        policy.sibling(seed=derived_seed(7, "arm-1")) as local,
        peer(openpi_python, "roboarena", server.url) as robot,
    ):
        for episode in range(2):
            robot.reset()
            local.reset()
            assert drive(robot.act, local, episode) > 5


def test_a_person_resets_the_scene_while_openpis_client_waits(
    policy: EdgePolicy, openpi_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than `--idle-s`, and than pings may take: it answers those, and keeps its history."""
    monkeypatch.setattr("vqbet_serve.server._PING_S", 2.0)
    with (
        serving(policy, idle_s=0.1) as server,
        policy.sibling() as local,
        peer(openpi_python, "openpi", server.url) as robot,
    ):
        for pause, seen in zip([0, 5, 0], observations(3, 3), strict=True):
            time.sleep(pause)
            assert robot.act(seen).tobytes() == local.act(seen).tobytes()


def test_openpis_cameras_as_they_are(policy: EdgePolicy, openpi_python: str) -> None:
    """One that is not looked at costs nothing; one of another size is named, and may be changed."""
    with (
        serving(policy) as server,
        policy.sibling() as local,
        peer(openpi_python, "openpi", server.url) as robot,
    ):
        for seen, (height, width) in zip(
            observations(3, 3), [(224, 224), (480, 640), (1080, 1920)], strict=True
        ):
            wrist = {"observation.images.wrist": [height, width, 3]}
            assert robot.act(seen, **wrist).tobytes() == local.act(seen).tobytes()
            with pytest.raises(RuntimeError) as refused:
                robot.act(seen, **{miniature.IMAGE: [height, width, 3]})
            assert "ObservationError: 'observation.image': expected uint8 (24" in str(refused.value)
            assert f"the camera gives {height}x{width}: resize" in str(refused.value)


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
