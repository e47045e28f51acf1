"""Existing clients drive the server, bitwise as the policy in this process."""

import subprocess
from pathlib import Path

import miniature
import numpy as np
import pytest
from environments import prepare
from serve.serving import observations, serving
from vqbet_serve import RemotePolicy
from vqbet_serve.frames import pack
from vqbet_serve.sessions import derived_seed

from vqbet_edge import EdgePolicy, Guards

PEER = Path(__file__).with_name("openpi_peer.py")


@pytest.fixture(scope="session")
def openpi_python() -> str:
    """Python with openpi-client, which wants NumPy 1, and with msgpack-numpy."""
    # openpi-client forgets typing_extensions.
    needs = ["openpi-client", "numpy<2", "typing_extensions", "msgpack-numpy"]
    return str(prepare("openpi", needs))


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["openpi", "msgpack_numpy", "roboarena"])
def test_a_client_of_another_project(
    policy: EdgePolicy,
    openpi_python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """A pause in which nothing is asked, cameras that nobody looks at, and a frame that is too large."""
    monkeypatch.setattr("vqbet_serve.server._PING_S", 0.5)
    seen = observations(1, 20)
    np.save(tmp_path / "images.npy", np.stack([each[miniature.IMAGE] for each in seen]))
    np.save(tmp_path / "states.npy", np.stack([each[miniature.STATE] for each in seen]))
    seed = derived_seed(7, "arm-1") if kind == "roboarena" else 7
    with serving(policy, seed=7, idle_s=0.1) as server, policy.sibling(seed=seed) as local:
        command = [openpi_python, PEER, kind, server.url, tmp_path]
        done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        actions = np.load(tmp_path / "actions.npy")
        assert actions.dtype == np.float32
        for number, action in enumerate(actions):
            if number == len(seen):  # a new connection is a new robot
                local.reset(seed=None if kind == "roboarena" else seed)
            np.testing.assert_array_equal(action, local.act(seen[number % len(seen)]))
    said = (tmp_path / "said").read_text()
    assert "ObservationError: 'observation.image': expected uint8 (24" in said
    assert "the camera gives 1080x1920: resize" in said


@pytest.mark.parametrize("name", [None, "arm-2"])
def test_remote_policy(policy: EdgePolicy, name: str | None) -> None:
    seed = 7 if name is None else derived_seed(7, name)
    guards = Guards(deadline_s=20, on_late="raise")
    with (
        serving(policy, seed=7) as server,
        policy.sibling(seed=seed) as local,
        RemotePolicy(server.url, guards=guards, session_id=name) as remote,
    ):
        for start in (seed, None, 3):
            if start != seed:
                remote.reset(start)
                local.reset(start)
            for seen in observations(1, 20):
                np.testing.assert_array_equal(remote.act(seen), local.act(seen))


@pytest.mark.extended
def test_frames_are_those_of_openpi(openpi_python: str) -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    message = {"image": image, "state": np.array([1.5, -2], np.float32), "deep": {"n": 1, "t": "x"}}
    code = f"""
import sys
from numpy import array, float32, uint8
from openpi_client import msgpack_numpy
sys.stdout.buffer.write(msgpack_numpy.packb({message!r}))
"""
    done = subprocess.run([openpi_python, "-c", code], capture_output=True, check=True, env={})
    assert pack(message) == done.stdout
