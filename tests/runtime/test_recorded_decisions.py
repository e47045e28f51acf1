"""Decisions in recordings: what comes back is what happened, whatever the disk and the robot do."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import recordings
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vqbet_edge import EdgePolicy, Guards
from vqbet_edge.errors import DatasetError, DiskError, ObservationError, UsageError
from vqbet_edge.runtime import recording
from vqbet_edge.runtime.recorded import Recording
from vqbet_edge.runtime.recording_format import DECISION_ARRAYS, Outcome

ROW_BYTES = 24 * 24 * 3 + 2 * 4 + 2 * 8


@pytest.fixture
def policy(mini: Path) -> EdgePolicy:
    return EdgePolicy.load(mini, seed=5)


def act(policy: EdgePolicy, observations: list[dict[str, np.ndarray]], folder: Path) -> list[Any]:
    """Act and record; every step's action and decision."""
    with policy.record(folder, decisions=True):
        return [(policy.act(observation), policy.last) for observation in observations]


def test_what_was_decided_comes_back(policy: EdgePolicy, tmp_path: Path) -> None:
    observations = miniature.observations(23)
    policy.act(miniature.observations(1)[0])
    done = act(policy, observations, tmp_path / "seen")
    recorded = Recording(tmp_path / "seen")
    (episode,) = recorded.episodes
    # The recording began in the middle of an episode, and says so.
    assert episode.steps.tolist() == list(range(1, 24))
    np.testing.assert_array_equal(episode.actions, [action for action, _ in done])
    np.testing.assert_array_equal(episode.states, [o[miniature.STATE] for o in observations])
    for row, observation in enumerate(observations):
        frame = episode.frame(miniature.IMAGE, row)
        np.testing.assert_array_equal(frame, observation[miniature.IMAGE])
    assert set(episode.outcomes.tolist()) == {Outcome.ACTED}
    assert (np.diff(episode.times) > 0).all()
    assert abs(episode.times[-1] / 1e9 - time.time()) < 60
    made = {decision.step: decision for _, decision in done if decision.step > 0}
    assert sorted(episode.steps[row] for row in episode.decisions) == sorted(made)
    for row, decision in episode.decisions.items():
        expected = made[int(episode.steps[row])]
        for name in DECISION_ARRAYS:
            np.testing.assert_array_equal(getattr(decision, name), getattr(expected, name))
        assert decision.seconds == expected.seconds
        for code, probabilities, draw in zip(
            decision.codes, decision.code_probabilities, decision.draws, strict=True
        ):  # each code is where its random number falls in the cumulative distribution
            edges = np.append(0, probabilities.cumsum())
            assert edges[code] <= draw < edges[code + 1] + 1e-12
        assert decision.seconds.keys() >= {"vision_encoder", "gpt", "code_heads"}
    chunk = policy.manifest.policy.action_chunk_size
    assert len(made) == (23 + 1) // chunk
    info = recorded.policy
    assert (info.seed, info.replan_every, info.backend) == (5, chunk, policy.backend_name)


def test_what_the_robot_saw_is_recorded(policy: EdgePolicy, tmp_path: Path) -> None:
    """For any reader of safetensors, uint8 and float frames alike; what was refused is not."""
    observations = miniature.observations(6)
    with policy.record(tmp_path / "seen"):
        for step, observation in enumerate(observations):
            if step == 4:
                policy.reset()
            floats = np.moveaxis(observation[miniature.IMAGE], -1, 0).astype(np.float32) / 255
            policy.act({**observation, miniature.IMAGE: floats} if step % 2 else observation)
            with pytest.raises(ObservationError):
                policy.act({**observation, miniature.STATE: np.full(2, np.nan, np.float32)})
    policy.act(observations[0])  # not recorded any more
    (path,) = (tmp_path / "seen").iterdir()
    arrays = load_file(path)
    for key in (miniature.IMAGE, miniature.STATE):
        np.testing.assert_array_equal(arrays[key], [o[key] for o in observations])
    assert arrays["episode"].tolist() == [0, 0, 0, 0, 1, 1]
    assert arrays.keys() == {miniature.IMAGE, miniature.STATE, "episode", "step"}
    with (
        pytest.raises(UsageError, match="holds a recording already"),
        policy.record(tmp_path / "seen"),
    ):
        pass


@pytest.mark.parametrize("decisions", [False, True])
def test_recording_changes_no_action(mini: Path, tmp_path: Path, decisions: bool) -> None:
    plain, recorded = (EdgePolicy.load(mini, seed=3) for _ in range(2))
    with recorded.record(tmp_path / "seen", decisions=decisions):
        for observation in miniature.observations(20):
            np.testing.assert_array_equal(plain.act(observation), recorded.act(observation))


def test_an_error_leaves_a_row_without_an_action(mini: Path, tmp_path: Path) -> None:
    *_, failed = recordings.record(mini, tmp_path / "seen", (3,)).episodes
    assert failed.outcomes.tolist() == [Outcome.RAISED]
    assert np.isnan(failed.actions).all()
    assert np.isnan(failed.seconds).all()
    assert not failed.decisions


def test_a_chunk_is_recorded_by_its_first_action(policy: EdgePolicy, tmp_path: Path) -> None:
    with policy.record(tmp_path / "seen", decisions=True):
        policy.act_chunk(miniature.observations(1)[0])
    (episode,) = Recording(tmp_path / "seen").episodes
    assert episode.outcomes.tolist() == [Outcome.CHUNK]
    np.testing.assert_array_equal(episode.actions[0], episode.decisions[0].action_chunk[0])


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_late_actions_are_marked_and_late_decisions_kept(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """In the next file, where the one that the observation is in has ended."""
    monkeypatch.setattr(recording, "_BLOCK_BYTES", block_bytes)
    guards = Guards(deadline_s=0.3, on_late="hold")
    policy = EdgePolicy.load(mini, guards=guards, replan_every=1)
    replan, wait, observations = (
        policy._window.graphs.replan,
        threading.Event(),
        miniature.observations(3),
    )

    def slow(*arguments: Any, **options: Any) -> Any:
        wait.wait(60)
        return replan(*arguments, **options)

    with policy.record(tmp_path / "seen", decisions=True):
        first = policy.act(observations[0])
        policy._window.graphs.replan = slow  # type: ignore[method-assign]
        np.testing.assert_array_equal(policy.act(observations[1]), first)
        wait.set()
        assert policy._deadline is not None
        assert not policy._deadline._late.running(60)
        policy.act(observations[2])
    (episode,) = Recording(tmp_path / "seen").episodes
    assert episode.outcomes.tolist() == [Outcome.ACTED, Outcome.LATE, Outcome.ACTED]
    assert sorted(episode.decisions) == [0, 1, 2]
    np.testing.assert_array_equal(episode.actions[1], episode.actions[0])


def test_a_slow_disk_costs_observations_and_says_so(
    policy: EdgePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """With no block free, nothing waits: what is left out is a gap, a warning and an error."""
    monkeypatch.setattr(recording, "_BLOCK_BYTES", 10 * (ROW_BYTES + 100))
    monkeypatch.setattr(recording, "_BLOCKS", 3)
    write, disk = recording._write_file, threading.Event()

    def stuck(*arguments: Any) -> None:
        disk.wait(60)
        write(*arguments)

    monkeypatch.setattr(recording, "_write_file", stuck)
    observations = miniature.observations(60)
    recorder = policy.record(tmp_path / "seen", decisions=True)
    recorder.__enter__()
    done = [(policy.act(o), policy.last) for o in observations[:50]]
    assert "disk is too slow" in caplog.text
    disk.set()
    assert not policy._recorder._writing.running(60)  # type: ignore[union-attr]
    done += [(policy.act(o), policy.last) for o in observations[50:]]
    with pytest.raises(DiskError, match=r"too slow: \d+ observations are missing"):
        recorder.__exit__(None, None, None)
    before, after = Recording(tmp_path / "seen").episodes
    assert before.steps.tolist() == list(range(len(before)))
    assert 20 < len(before) < 50
    assert after.steps.tolist() == list(range(50, 60))
    assert [after.history_is_whole(row, 3) for row in range(4)] == [False, False, True, True]
    assert before.history_is_whole(0, 3)
    for episode in (before, after):
        expected = [done[step][0] for step in episode.steps.tolist()]
        np.testing.assert_array_equal(episode.actions, expected)
        for decision in episode.decisions.values():
            np.testing.assert_array_equal(decision.codes, done[decision.step][1].codes)


def test_a_file_that_was_lost_is_a_gap(
    policy: EdgePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied from a robot without one of its files."""
    monkeypatch.setattr(recording, "_BLOCK_BYTES", 10 * (ROW_BYTES + 100))
    act(policy, miniature.observations(50), tmp_path / "seen")
    (whole,) = Recording(tmp_path / "seen").episodes
    first, lost, *_ = (len(load_file(p)["step"]) for p in sorted((tmp_path / "seen").iterdir()))
    sorted((tmp_path / "seen").iterdir())[1].unlink()
    before, after = Recording(tmp_path / "seen").episodes
    assert before.steps.tolist() == list(range(first))
    assert after.steps.tolist() == list(range(first + lost, 50))
    np.testing.assert_array_equal(after.actions, whole.actions[first + lost :])
    assert not after.history_is_whole(0, 3)


def test_a_failing_disk_ends_the_recording_only(policy: EdgePolicy, tmp_path: Path) -> None:
    recorder = policy.record(tmp_path / "seen", decisions=True)
    recorder.__enter__()
    (tmp_path / "seen").rmdir()
    assert np.isfinite(policy.act(miniature.observations(1)[0])).all()
    with pytest.raises(DiskError, match="recording has ended"):
        recorder.__exit__(None, None, None)


def test_the_size_limit_counts_decisions(policy: EdgePolicy, tmp_path: Path, caplog: Any) -> None:
    limit = 60_000
    with policy.record(tmp_path / "seen", decisions=True, max_bytes=limit):
        for observation in miniature.observations(60):
            policy.act(observation)
    assert "is full" in caplog.text
    arrays = load_file(next((tmp_path / "seen").iterdir()))
    used = sum(array.nbytes for array in arrays.values())
    assert 0.9 * limit < used <= limit
    with pytest.raises(UsageError, match="one observation has"):
        policy.record(tmp_path / "more", decisions=True, max_bytes=ROW_BYTES).__enter__()


KILLED = """
import sys, numpy as np
from vqbet_edge import EdgePolicy
from vqbet_edge.runtime import recording
recording._BLOCK_BYTES = 20_000
policy = EdgePolicy.load(sys.argv[1])
random = np.random.default_rng(0)
with policy.record(sys.argv[2], decisions=True):
    for step in range(100_000):
        image = random.integers(0, 256, (24, 24, 3), np.uint8)
        state = random.uniform((-2, 10), (2, 50)).astype(np.float32)
        policy.act({"observation.image": image, "observation.state": state})
        print(step, flush=True)
"""


def test_a_kill_leaves_all_but_the_newest(mini: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(mini), str(tmp_path / "seen")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as robot:
        assert robot.stdout is not None
        for line in robot.stdout:
            if int(line) == 200:
                robot.send_signal(signal.SIGKILL)
                break
        last = max([200, *(int(line) for line in robot.stdout)])
    (episode,) = Recording(tmp_path / "seen").episodes
    assert episode.steps.tolist() == list(range(len(episode)))
    # Complete files of 11 rows; at most those of the fixed number of blocks are lost.
    assert last - len(episode) < 11 * recording._BLOCKS
    random = np.random.default_rng(0)
    for row in range(len(episode)):
        expected = miniature.observation(random)[miniature.IMAGE]
        np.testing.assert_array_equal(episode.frame(miniature.IMAGE, row), expected)


def test_other_recordings_are_refused_in_words(policy: EdgePolicy, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no recording: expected files"):
        Recording(tmp_path)
    with policy.record(tmp_path / "plain"):
        policy.act(miniature.observations(1)[0])
    with pytest.raises(DatasetError, match="without decisions"):
        Recording(tmp_path / "plain")
    act(policy, miniature.observations(5), tmp_path / "seen")
    (path,) = (tmp_path / "seen").iterdir()
    arrays = load_file(path)
    for text, message in (
        ('{"format_version": 3}', "has format 3, expected 2"),
        ("{", "no recording of ours"),
    ):
        save_file(arrays, path, {"recording": text})
        with pytest.raises(DatasetError, match=message):
            Recording(tmp_path / "seen")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match="cannot be read"):
        Recording(tmp_path / "seen")


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        ("action", lambda a: a[:, :1].copy()),
        ("step", lambda a: a.astype(np.int32)),
        ("outcome", lambda a: a + 9),
        ("time", lambda a: a - (1 << 62)),
        ("decision.codes", lambda a: a + 8),
        ("decision.action_chunk", lambda a: a[:, :, :1].copy()),
        ("decision.seconds.gpt", lambda a: a[:0]),
        ("decision.clamped", None),
    ],
)
def test_what_no_recorder_writes_is_refused(
    policy: EdgePolicy, tmp_path: Path, key: str, spoil: Any
) -> None:
    """A recording may come from anybody, and is read as data."""
    act(policy, miniature.observations(8), tmp_path / "seen")
    (path,) = (tmp_path / "seen").iterdir()
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = dict(load_file(path))
    if spoil is None:
        del arrays[key]
    else:
        arrays[key] = spoil(arrays[key])
    save_file(arrays, path, metadata)
    with pytest.raises(DatasetError, match="cannot be read"):
        Recording(tmp_path / "seen")
