"""A data set made of recordings holds what was recorded: by our reader and by LeRobot 0.6.1."""

import json
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import oracle
import pytest
from recordings import record
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.runtime.recorded import Recording
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.from_recordings import DatasetConfig, make_dataset, text


@pytest.fixture(scope="module")
def recorded(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Three episodes, of which the last is one failed call, and one with a mark and an error."""
    folder = tmp_path_factory.mktemp("dataset") / "seen"
    record(mini, folder, (17, 9))
    policy, random = EdgePolicy.load(mini), np.random.default_rng(2)
    with policy.record(folder.with_name("more"), decisions=True):
        for step in range(6):
            policy.act(miniature.observation(random))
            if step == 3:
                policy.mark("the cup fell")
    return Recording(folder)


@pytest.fixture(scope="module")
def made(recorded: Recording) -> Path:
    folder = recorded.folder
    config = DatasetConfig((folder, folder.with_name("more")), folder.with_name("data"), fps=20)
    result = make_dataset(config)
    assert (result.episodes, result.frames, result.left_out, result.fps) == (3, 32, 1, 20)
    assert (2, 3, "the cup fell") in result.marks
    assert "1 observations without an action" in text(result)
    return config.output


def originals(recorded: Recording) -> list[Any]:
    more = Recording(recorded.folder.with_name("more"))
    return [*recorded.episodes[:2], *more.episodes]


def test_our_reader_finds_what_was_recorded(recorded: Recording, made: Path) -> None:
    data = LeRobotDataset.open(made)
    assert data.fps == 20
    place = 0
    for episode in originals(recorded):
        rows = slice(place, place + len(episode))
        np.testing.assert_array_equal(data.column(miniature.STATE)[rows], episode.states)
        np.testing.assert_array_equal(data.column("action")[rows], episode.actions)
        marks = np.array([row in episode.marks for row in range(len(episode))])
        np.testing.assert_array_equal(np.ravel(data.column("mark")[rows]), marks)
        for row in range(len(episode)):
            expected = episode.frame(miniature.IMAGE, row)
            np.testing.assert_array_equal(data.frames(miniature.IMAGE)[place + row], expected)
        place += len(episode)
    assert place == data.num_frames == 32


@pytest.mark.extended
@pytest.mark.skipif(not oracle.newest(), reason="LeRobot 0.6 needs Python 3.12; here it is 0.4.4")
def test_lerobot_reads_it(recorded: Recording, made: Path) -> None:
    data: Any = oracle.lerobot("datasets.lerobot_dataset").LeRobotDataset("local/seen", root=made)
    rows = [data[index] for index in range(len(data))]
    expected = [
        (number, row, episode)
        for number, episode in enumerate(originals(recorded))
        for row in range(len(episode))
    ]
    assert len(rows) == len(expected) == 32
    assert data.num_episodes == 3
    for got, (number, row, episode) in zip(rows, expected, strict=True):
        assert (int(got["episode_index"]), int(got["frame_index"])) == (number, row)
        assert got["task"].startswith("recorded with ")
        assert bool(got["mark"]) == (row in episode.marks)
        np.testing.assert_array_equal(got[miniature.STATE], episode.states[row])
        np.testing.assert_array_equal(got["action"], episode.actions[row])
        pixels = (got[miniature.IMAGE].permute(1, 2, 0).numpy() * 255).round()
        np.testing.assert_array_equal(pixels, episode.frame(miniature.IMAGE, row))


def test_statistics_are_those_of_all_frames(recorded: Recording, made: Path) -> None:
    """Computed in one piece here, in pieces there."""
    frames = [e.frame(miniature.IMAGE, row) for e in originals(recorded) for row in range(len(e))]
    pixels = np.concatenate([frame.reshape(-1, 3) for frame in frames]) / 255
    stats = json.loads((made / "meta" / "stats.json").read_text())[miniature.IMAGE]
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(
            np.ravel(stats[name]), getattr(pixels, name)(axis=0), rtol=1e-6, atol=1e-9
        )


def test_an_error_in_the_middle_ends_an_episode(recorded: Recording, tmp_path: Path) -> None:
    (path,) = sorted(recorded.folder.with_name("more").iterdir())
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = {key: values.copy() for key, values in load_file(path).items()}
    arrays["action"][2] = arrays["seconds"][2] = np.nan
    arrays["outcome"][2] = 2
    (tmp_path / "seen").mkdir()
    save_file(arrays, tmp_path / "seen" / path.name, metadata)
    result = make_dataset(DatasetConfig((tmp_path / "seen",), tmp_path / "data", fps=10))
    assert (result.episodes, result.frames, result.left_out) == (2, 5, 1)
    assert (1, 0, "the cup fell") in result.marks
    data = LeRobotDataset.open(tmp_path / "data")
    np.testing.assert_array_equal(data.column("action"), np.delete(arrays["action"], 2, axis=0))


def test_the_rate_is_the_demonstrations_or_measured(recorded: Recording, tmp_path: Path) -> None:
    result = make_dataset(DatasetConfig((recorded.folder,), tmp_path / "data"))
    assert result.fps == (recorded.policy.fps or result.measured)
    gaps = np.concatenate([np.diff(episode.times) for episode in recorded.episodes])
    assert result.measured == pytest.approx(1e9 / np.median(gaps), rel=0.01)


def test_what_cannot_be_made_is_said(recorded: Recording, mini: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        DatasetConfig((recorded.folder,), tmp_path)
    with pytest.raises(DatasetError, match="holds no recording"):
        make_dataset(DatasetConfig((tmp_path,), tmp_path / "data"))
    with pytest.raises(UsageError, match="expected a positive number"):
        DatasetConfig((recorded.folder,), tmp_path / "data", fps=0)
    record(mini, tmp_path / "failed", ())
    with pytest.raises(DatasetError, match="no observation with an action"):
        make_dataset(DatasetConfig((tmp_path / "failed",), tmp_path / "data"))
    assert not (tmp_path / "data").exists()
