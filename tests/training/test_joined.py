"""Training on several data sets at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sizes import losses, short_run

from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.dataset import SOURCE
from vqbet_edge.training.dataset.joined import JoinedDataset
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.feeding import Feeder, Feeding
from vqbet_edge.training.trainer import train
from vqbet_edge.training.windows import Mixture, Shuffle

CAMERA = "observation.image"


def demonstrations(lengths: list[int], seed: int, dim: int = 2) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {
            CAMERA: random.integers(0, 256, (length, 64, 64, 3), np.uint8),
            "observation.state": random.uniform(-1, 1, (length, dim)).astype(np.float32),
            "action": random.uniform(-seed, seed, (length, 2)).astype(np.float32),
        }
        for length in lengths
    ]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two data sets, and one that holds the episodes of both."""
    one, two = demonstrations([12, 40, 9], 1), demonstrations([15, 33], 2)
    for name, each in {"one": one, "two": two, "both": [*one, *two]}.items():
        write_dataset(tmp_path / name, each, fps=10, task="move")
    return tmp_path / "one", tmp_path / "two", tmp_path / "both"


@pytest.mark.parametrize("way", ["memory", "cache", "stream"])
def test_two_are_as_one_of_all_episodes(
    written: tuple[Path, Path, Path], tmp_path: Path, way: Any
) -> None:
    import torch

    one, two, both = written
    cache = tmp_path / "cache" if way == "cache" else None
    joined, whole = (
        JoinedDataset([LeRobotDataset.open(path, cache_dir=cache) for path in paths])
        for paths in ((one, two), (both,))
    )
    assert joined.num_frames == whole.num_frames
    assert joined.bounds.tolist() == whole.bounds.tolist()
    assert joined.parts.tolist() == [0, 0, 0, 1, 1]
    for key in ("observation.state", "action"):
        assert np.array_equal(joined.column(key), whole.column(key))
    for key in ("action", CAMERA):
        for name, value in joined.statistics(key).items():
            np.testing.assert_allclose(value, whole.statistics(key)[name], rtol=1e-5, atol=1e-6)
    windows = [np.array([[50, 51], [61, 61], [107, 108]])]
    seen = [
        next(Feeder(each, [CAMERA], Feeding(way, 1), torch.device("cpu")).images(windows))
        for each in (joined, whole)
    ]
    assert torch.equal(*seen)
    for position in range(5):
        expected = whole.episode(position)
        for key, value in joined.episode(position).items():
            assert np.array_equal(value, expected[key])


@pytest.mark.usefixtures("without_report")
def test_a_run_on_two_is_that_on_all_and_resumes(
    written: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    one, two, both = written
    # Cameras' statistics are of the same frames, but rounded at another place.
    visual = {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}
    options = {"more_datasets": (str(two),), "normalization_mapping": visual}
    train(short_run(one, tmp_path / "joined", steps=12, **options))
    train(short_run(one, tmp_path / "joined", steps=12, resume=True, **options))
    train(short_run(both, tmp_path / "whole", steps=12, normalization_mapping=visual))
    assert losses(tmp_path / "joined") == losses(tmp_path / "whole")
    with pytest.raises(UsageError, match="is not what the run"):
        train(short_run(one, tmp_path / "joined", steps=14, resume=True))


def test_weights_are_the_shares_that_are_drawn() -> None:
    small, large = np.arange(10), np.arange(10, 1010)
    shuffle = Shuffle(np.arange(1010), 64, 5, Mixture((small, large), (3, 1)))
    drawn = np.concatenate([shuffle.batch(step) for step in range(400)])
    assert (drawn < 10).mean() == pytest.approx(0.75, abs=0.02)
    assert set(drawn) >= set(range(10))
    assert len(set(drawn)) > 990
    again = Shuffle(np.arange(1010), 64, 5, Mixture((small, large), (3, 1)))
    assert np.array_equal(again.batch(399), drawn[-64:])
    assert not np.array_equal(again.batch(1), again.batch(2))


def with_other_rate(path: Path) -> None:
    write_dataset(path, demonstrations([20], 3), fps=20, task="move")


def with_another_state(path: Path) -> None:
    write_dataset(path, demonstrations([20], 3, dim=3), fps=10, task="move")


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (with_other_rate, "20 frames a second and .*one has 10"),
        (with_another_state, "'observation.state' is a vector of 3, and a vector of 2 in"),
    ],
)
def test_what_does_not_fit_is_refused(
    written: tuple[Path, Path, Path], tmp_path: Path, write: Callable[[Path], None], text: str
) -> None:
    write(tmp_path / "other")
    with pytest.raises(DatasetError, match=text):
        train(short_run(written[0], tmp_path / "run", more_datasets=(str(tmp_path / "other"),)))


def test_weights_are_one_for_each(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a number for each of 2 data sets"):
        short_run(tmp_path, tmp_path, more_datasets=("b",), dataset_weights=(1, 2, 3))


def test_twins_are_on_one_side(tmp_path: Path) -> None:
    seen = demonstrations([5] * 12, 1)
    twins = [{**each, SOURCE: np.full((5, 1), number % 6)} for number, each in enumerate(seen)]
    write_dataset(tmp_path / "twins", twins, fps=10, task="move")
    data = LeRobotDataset.open(tmp_path / "twins")
    for each in (data, JoinedDataset([data, data])):
        for seed in range(5):
            split = each.split(0.3, seed)
            sides = [{int(each.parts[i]) * 6 + i % 6 for i in side} for side in split]
            assert not sides[0] & sides[1]
            assert len(split.train) + len(split.validation) == each.num_episodes
            assert len(split.validation) == 4 * len(split.validation) // 4 > 0
