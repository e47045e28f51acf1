"""A recording that has the incident in it: the newest kept, its moments marked."""

import time
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vqbet_edge import EdgePolicy, Guards
from vqbet_edge.errors import DatasetError, ObservationError, UsageError
from vqbet_edge.runtime import recording_format
from vqbet_edge.runtime.recorded import Recording

LIMIT = 150_000


@pytest.fixture
def policy(mini: Path) -> EdgePolicy:
    return EdgePolicy.load(mini, seed=5)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in recording_format.files(folder))


@pytest.mark.parametrize("number_of_the_first", [0, 999_998])
def test_a_ring_ends_with_the_newest(
    policy: EdgePolicy, tmp_path: Path, number_of_the_first: int
) -> None:
    """Also behind the millionth file, whose name is longer."""
    actions, folder = [], tmp_path / "seen"
    with policy.record(folder, decisions=True, max_bytes=LIMIT, keep="last"):
        policy._recorder._files = number_of_the_first  # type: ignore[union-attr]
        for observation in miniature.observations(200):
            actions.append(policy.act(observation))
            assert used(folder) <= LIMIT
            # The disk of this test is never the slow one.
            policy._recorder._writing.wait()  # type: ignore[union-attr]
    assert LIMIT / 2 < used(folder) <= LIMIT
    (episode,) = Recording(folder).episodes
    assert 0 < episode.steps[0] < 199 == episode.steps[-1]
    np.testing.assert_array_equal(episode.actions, actions[int(episode.steps[0]) :])
    for row, number in ((0, int(episode.steps[0])), (len(episode) - 1, 199)):
        frame = episode.frame(miniature.IMAGE, row)
        np.testing.assert_array_equal(frame, miniature.observations(200)[number][miniature.IMAGE])


def test_a_ring_needs_room_for_four(policy: EdgePolicy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="4 observations have"):
        policy.record(tmp_path / "seen", max_bytes=4000, keep="last").__enter__()
    with pytest.raises(UsageError, match="unknown keep 'newest'"):
        policy.record(tmp_path / "seen", keep="newest").__enter__()  # type: ignore[arg-type]


def test_marks_stand_where_they_were_made(policy: EdgePolicy, tmp_path: Path) -> None:
    observations = miniature.observations(12)
    broken = {**observations[0], miniature.STATE: np.full(2, np.nan, np.float32)}
    with pytest.raises(UsageError, match="nothing is recorded"):
        policy.mark("too early")
    with policy.record(tmp_path / "seen", decisions=True, keep="last"):
        for step, observation in enumerate(observations):
            if step == 6:
                policy.reset()
            policy.act(observation)
            if step == 2:
                policy.mark("the cup\nfell \ud800" + "x" * 2000)
            if step == 8:
                for _ in range(3):
                    with pytest.raises(ObservationError):
                        policy.act(broken)
                # On the disk now, in a file that has its name.
                policy._recorder._writing.wait()  # type: ignore[union-attr]
                assert [mark.step for mark in Recording(tmp_path / "seen").marks] == [2, 2]
        policy.mark("end")
        with pytest.raises(UsageError, match="expected a text"):
            policy.mark("")
    recorded = Recording(tmp_path / "seen")
    first, second = recorded.episodes
    assert list(first.marks) == [2]
    (mark,) = first.marks[2]
    assert mark.text == ("the cup fell  " + "x" * 2000)[:1000]
    assert first.times[2] <= mark.time <= first.times[3]
    assert {row: [m.text[:17] for m in marks] for row, marks in second.marks.items()} == {
        2: ["ObservationError:"],
        5: ["end"],
    }
    assert len(recorded.marks) == 3


def test_the_first_of_late_steps_is_marked(mini: Path, tmp_path: Path) -> None:
    policy = EdgePolicy.load(mini, seed=5, guards=Guards(deadline_s=30, on_late="hold"))
    with policy.record(tmp_path / "seen", decisions=True):
        recorder: Any = policy._recorder
        for step, (period, observation) in enumerate(
            zip((60, 0, 0, 60, 0), miniature.observations(5), strict=True)
        ):
            recorder._period = period
            policy.act(observation)
            assert len(recorder._marked) == (0, 1, 1, 1, 2)[step]
    (episode,) = Recording(tmp_path / "seen").episodes
    assert {row: marks[0].text[:6] for row, marks in episode.marks.items()} == {
        1: "late: ",
        4: "late: ",
    }


def test_when_an_observation_was_taken_is_kept(policy: EdgePolicy, tmp_path: Path) -> None:
    with policy.record(tmp_path / "seen", decisions=True):
        for observation in miniature.observations(3):
            policy.act(observation, observation_time=time.monotonic() - 0.05)
            time.sleep(0.002)
        policy.reset()
        policy.act(miniature.observations(1)[0])
    stamped, without = Recording(tmp_path / "seen").episodes
    ages = stamped.times - stamped.observation_times
    assert (ages >= 50_000_000).all()
    assert (np.diff(stamped.observation_times) > 0).all()
    assert without.observation_times.tolist() == [0]
    # What was recorded before this was kept reads as ever.
    (path,) = (tmp_path / "seen").iterdir()
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = dict(load_file(path))
    del arrays["observation_time"]
    save_file(arrays, path, metadata)
    assert Recording(tmp_path / "seen").episodes[0].observation_times.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "marks", ["{", '[{"episode": -1}]', '[{"episode": 0, "step": 4294967296}]']
)
def test_marks_that_no_recorder_writes_are_refused(
    policy: EdgePolicy, tmp_path: Path, marks: str
) -> None:
    with policy.record(tmp_path / "seen", decisions=True):
        policy.act(miniature.observations(1)[0])
    (path,) = (tmp_path / "seen").iterdir()
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(dict(load_file(path)), path, {**metadata, "marks": marks})
    with pytest.raises(DatasetError, match="cannot be read"):
        Recording(tmp_path / "seen")
