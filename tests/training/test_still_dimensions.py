"""What hardly ever moves is scaled by what it does, and named."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sizes import SMALL

from vqbet_edge.training.config import NormalizationMode, TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.normalization import STATISTICS, Scalings, still_warning

STATE = "observation.state"
# So many frames, in three of which the gripper is closed; a third joint stays where it is.
FRAMES, PARKED = 500, 0.1


def vectors() -> np.ndarray:
    steps = np.arange(FRAMES)
    gripper = np.isin(steps, (20, 21, 22))
    return np.stack([np.sin(steps / 5), gripper, np.full(FRAMES, PARKED)], 1).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    root = tmp_path_factory.mktemp("still") / "data"
    image = np.zeros((FRAMES, 32, 32, 3), np.uint8)
    values = {"observation.image": image, STATE: vectors(), "action": vectors()}
    write_dataset(root, [values], fps=10, task="x")
    return LeRobotDataset.open(root)


def scalings(dataset: LeRobotDataset, mode: str) -> Scalings:
    mapping = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    fields: dict[str, Any] = {**SMALL, "crop_shape": None, "normalization_mapping": mapping}
    config = TrainConfig(dataset="d", output="o", **fields)
    return Scalings.of(dataset, config.policy(dataset))


@pytest.mark.parametrize("mode", ["MIN_MAX", "MEAN_STD", "QUANTILES", "QUANTILE10"])
def test_no_dimension_is_divided_by_next_to_nothing(dataset: LeRobotDataset, mode: str) -> None:
    found = scalings(dataset, mode)
    state = found.normalize(STATE, vectors())
    noisy = found.normalize(STATE, vectors() + np.float32(1e-3))
    assert (noisy - state).abs().max() < 0.02
    assert state.abs().max() < 15
    actions = found.normalize("action", vectors()).numpy()
    assert np.abs(actions).max() < 15
    back = found.backward["action"].apply(actions)
    np.testing.assert_allclose(back, vectors(), atol=1e-5)
    # What the network says of an action that never moves is not what the robot gets.
    np.testing.assert_allclose(found.backward["action"].apply(actions + 1)[:, 2], PARKED, atol=1e-6)


def test_only_what_hardly_moves_is_scaled_otherwise_and_named(dataset: LeRobotDataset) -> None:
    found = scalings(dataset, "QUANTILES")
    low, high = (found.stats[STATE][name] for name in ("q01", "q99"))
    np.testing.assert_allclose([low[0], high[0]], np.quantile(vectors()[:, 0], [0.01, 0.99]), 1e-6)
    assert [low[1], high[1]] == [0, 1]
    assert set(found.stats[STATE]) == {"q01", "q99", "lowest", "highest"}
    said = "\n".join(found.advice)
    assert f"{STATE} '1' hardly ever moves" in said
    assert "action '1' hardly ever moves" in said
    assert f"{STATE} '2' is 0.1 in all frames" in said
    assert "'0'" not in said
    assert not any("'1'" in text for text in scalings(dataset, "MIN_MAX").advice)


@pytest.mark.parametrize("mode", ["MIN_MAX", "MEAN_STD", "QUANTILES"])
def test_lerobots_formula_makes_the_same_of_what_is_stored(
    dataset: LeRobotDataset, mode: str, lerobot: Callable[[str], ModuleType]
) -> None:
    types = lerobot("configs.types")
    found = scalings(dataset, mode)
    step = lerobot("processor.normalize_processor").NormalizerProcessorStep(
        features={STATE: types.PolicyFeature(types.FeatureType.STATE, (3,))},
        norm_map={types.FeatureType.STATE: types.NormalizationMode(mode)},
        stats={STATE: {k: torch.from_numpy(v) for k, v in found.stats[STATE].items()}},
    )
    theirs = step._normalize_observation({STATE: torch.from_numpy(vectors())}, inverse=False)[STATE]
    torch.testing.assert_close(found.normalize(STATE, vectors()), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["MIN_MAX", "MEAN_STD", "QUANTILES", "QUANTILE10"])
def test_a_checkpoint_that_divides_by_next_to_nothing_is_named(mode: str) -> None:
    """It computes as LeRobot does; whoever exports it is told."""
    names = STATISTICS[NormalizationMode(mode)]
    values = np.array([[1, 0.5], [2, 0.5 if mode != "MEAN_STD" else 0]], np.float32)
    stats = dict(zip(names, values, strict=True))
    said = still_warning(STATE, NormalizationMode(mode), stats)
    assert f"'{STATE}' [1] did not move" in said
    assert "differs from [0.5]" in said
    moving = {name: value[:1] for name, value in stats.items()}
    assert still_warning(STATE, NormalizationMode(mode), moving) == ""
