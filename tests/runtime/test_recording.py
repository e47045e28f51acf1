"""Recordings: what is in them, and that they never stop the robot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from workshop import Exported

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import DiskError, ObservationError, UsageError

IMAGE, STATE = "observation.image", "observation.state"


def observations(exported: Exported, count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    height, width = exported.case.image
    return [
        {
            IMAGE: random.integers(0, 256, (height, width, 3), np.uint8),
            STATE: random.uniform(100, 400, exported.case.state_dim).astype(np.float32),
        }
        for _ in range(count)
    ]


def recorded(folder: Path) -> dict[str, Any]:
    parts = [load_file(path) for path in sorted(folder.iterdir())]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def test_what_the_robot_saw_is_recorded(tiny: Exported, tmp_path: Path) -> None:
    """Read by the safetensors package; uint8 and float frames alike."""
    policy, seen = EdgePolicy.load(tiny.bundle), observations(tiny, 6)
    with policy.record(tmp_path / "seen"):
        for step, observation in enumerate(seen):
            if step == 4:
                policy.reset()
            if step % 2:
                as_floats = np.moveaxis(observation[IMAGE], -1, 0).astype(np.float32) / 255
                policy.act({**observation, IMAGE: as_floats})
            else:
                policy.act(observation)
    policy.act(seen[0])  # not recorded any more
    found = recorded(tmp_path / "seen")
    np.testing.assert_array_equal(found[IMAGE], [o[IMAGE] for o in seen])
    np.testing.assert_array_equal(found[STATE], [o[STATE] for o in seen])
    assert found["episode"].tolist() == [0, 0, 0, 0, 1, 1]


def test_recording_changes_no_action(tiny: Exported, tmp_path: Path) -> None:
    plain, recording = (EdgePolicy.load(tiny.bundle, seed=3) for _ in range(2))
    with recording.record(tmp_path / "seen"):
        for observation in observations(tiny, 8):
            np.testing.assert_array_equal(plain.act(observation), recording.act(observation))


def test_refused_observations_are_not_recorded(tiny: Exported, tmp_path: Path) -> None:
    policy, seen = EdgePolicy.load(tiny.bundle), observations(tiny, 1)
    with policy.record(tmp_path / "seen"):
        policy.act(seen[0])
        with pytest.raises(ObservationError):
            policy.act({**seen[0], STATE: np.full(tiny.case.state_dim, np.nan, np.float32)})
    assert len(recorded(tmp_path / "seen")["episode"]) == 1


def test_the_size_limit_holds(tiny: Exported, tmp_path: Path, caplog: Any) -> None:
    policy = EdgePolicy.load(tiny.bundle)
    limit = 20_000
    with policy.record(tmp_path / "seen", max_bytes=limit):
        for observation in observations(tiny, 9):
            policy.act(observation)
    assert len(recorded(tmp_path / "seen")["episode"]) == 3
    assert "is full" in caplog.text


def test_a_recording_is_never_overwritten(tiny: Exported, tmp_path: Path) -> None:
    policy = EdgePolicy.load(tiny.bundle)
    with policy.record(tmp_path / "seen"):
        policy.act(observations(tiny, 1)[0])
    with (
        pytest.raises(UsageError, match="holds a recording already"),
        policy.record(tmp_path / "seen"),
    ):
        pass


def test_a_failing_disk_does_not_stop_the_robot(tiny: Exported, tmp_path: Path) -> None:
    policy, folder = EdgePolicy.load(tiny.bundle), tmp_path / "seen"
    recording = policy.record(folder)
    recording.__enter__()
    folder.rmdir()
    action = policy.act(observations(tiny, 1)[0])
    assert np.isfinite(action).all()
    with pytest.raises(DiskError, match="recording has ended"):
        recording.__exit__(None, None, None)
