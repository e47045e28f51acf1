"""What a server records: every session by itself, within one limit, and nobody waits or fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.serving import ask, observations, open_client, serving
from vqbet_serve.recordings import Recordings

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge.runtime import recording, recording_format
from vqbet_edge.runtime.recorded import Recording


def sessions(folder: Path) -> list[Path]:
    return sorted(folder.glob("session_*"))


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_every_session_is_recorded_by_itself(policy: EdgePolicy, tmp_path: Path) -> None:
    folder, seen = tmp_path / "seen", observations(1, 12)
    given: dict[str, list[Any]] = {"../arm": [], "other": []}
    with (
        serving(policy, recordings=Recordings(folder, 64 << 20, 4)) as server,
        open_client(server.url) as client,
    ):
        for each in seen:
            for name, actions in given.items():
                actions.append(ask(client, {**each, "session_id": name}))
    episodes = [Recording(each).episodes for each in sessions(folder)]
    assert len(episodes) == 2
    for (episode,), actions in zip(episodes, given.values(), strict=True):
        np.testing.assert_array_equal(episode.actions, actions)
    assert list(tmp_path.iterdir()) == [folder]


def test_all_recordings_together_keep_to_the_limit(policy: EdgePolicy, tmp_path: Path) -> None:
    """Ended ones of any server; those that are open stay."""
    limit, most, seen = 400_000, 2, observations(1, 60)
    for _ in range(2):
        recordings = Recordings(tmp_path, limit, most)
        with policy.sibling() as robot, recordings.recording(robot):
            for each in seen[:4]:
                robot.act(each)
            (staying,) = set(sessions(tmp_path)) - set(sessions(tmp_path)[:-1])
            for _ in range(5):
                with policy.sibling() as other, recordings.recording(other):
                    for each in seen:
                        other.act(each)
                        other._recorder._writing.wait()  # type: ignore[union-attr]
                        assert used(tmp_path) <= limit
                assert staying in sessions(tmp_path)
        assert limit / 2 < used(tmp_path) <= limit
        # The newest that has ended is among those that are left.
        newest = sessions(tmp_path)[-1]
        assert Recording(newest).episodes[-1].steps[-1] == len(seen) - 1
    with pytest.raises(UsageError, match="--record-megabytes above 0"):
        Recordings(tmp_path, 0, most)


def test_a_disk_that_fails_stops_no_robot(
    policy: EdgePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "_write_file", broken)
    recordings, seen = Recordings(tmp_path / "seen", 64 << 20, 4), observations(1, 3)
    with policy.sibling() as robot, recordings.recording(robot):
        for each in seen:
            assert np.isfinite(robot.act(each)).all()
    assert "recording has ended" in caplog.text
    (session,) = sessions(tmp_path / "seen")
    assert not recording_format.files(session)
    session.rmdir()
    (tmp_path / "seen").rmdir()
    (tmp_path / "seen").touch()
    with policy.sibling() as robot, recordings.recording(robot):
        for each in seen:
            assert np.isfinite(robot.act(each)).all()
    assert "a session is not recorded" in caplog.text
