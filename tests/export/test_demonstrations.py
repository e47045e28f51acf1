"""What an export takes from the demonstrations behind a checkpoint, and what it says of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import miniature
import numpy as np
import pytest
from miniature import IMAGE, SIZE, STATE
from vqbet_calibration.samples import load_samples
from vqbet_export import exporter
from vqbet_export.exporter import ExportConfig, ExportResult, export

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.manifest import ACTION_RANGE, STATE_RANGE
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.proof import prove
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.description import describe

FPS, EPISODES, STEPS = 12.5, 16, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations to the left and to the right, in turns."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "d"
    demonstrations = []
    for episode in range(EPISODES):
        side = np.float32([(-1) ** episode, 30])
        moves = side + random.uniform(-0.5, 0.5, (STEPS, 2)).astype(np.float32)
        frames = random.integers(0, 256, (STEPS, SIZE, SIZE, 3), np.uint8)
        demonstrations.append({IMAGE: frames, STATE: moves, "action": moves})
    write_dataset(root, demonstrations, FPS, "to one side")
    return root


def exported(path: Path, checkpoint: Checkpoint, **options: Any) -> ExportResult:
    config = ExportConfig("miniature", path, verify_steps=16, targets=("cpu",), **options)
    with mock.patch.object(exporter, "load_any", return_value=checkpoint):
        return export(config)


def unscaled() -> Checkpoint:
    """A policy whose files have no statistics and no rate."""
    return replace(miniature.checkpoint(), normalization={})


def test_without_demonstrations_it_says_what_nobody_knows(tmp_path: Path) -> None:
    found = exported(tmp_path / "a.bundle", replace(unscaled(), dataset="nobody/knows"))
    bundle, said = Bundle.open(found.path), " ".join(found.notes)
    assert (bundle.manifest.fps, bundle.demonstrated(ACTION_RANGE, 2)) == (None, None)
    for word in ("'nobody/knows', which is not here", "none are clamped", "--fps", "noise only"):
        assert word in said
    assert "nobody/knows" in (found.path / "report.md").read_text()
    with EdgePolicy.load(found.path, "onnxruntime", prove=True) as policy:
        assert policy.fps is None


def test_the_data_set_that_the_checkpoint_names_is_taken(tmp_path: Path, data: Path) -> None:
    found = exported(tmp_path / "a.bundle", replace(unscaled(), dataset=str(data)))
    bundle, dataset = Bundle.open(found.path), LeRobotDataset.open(data)
    assert bundle.manifest.fps == FPS
    for name, key in ((STATE_RANGE, STATE), (ACTION_RANGE, "action")):
        wanted = np.stack([*dataset.statistics(key, ("min", "max")).values()])
        np.testing.assert_array_equal(bundle.demonstrated(name, 2), wanted)
    verified = bundle.manifest.verification
    assert verified is not None
    assert (verified.observations, verified.cases) == ("dataset", "dataset")
    assert [result["observations"] for result in found.report["results"]] == ["random", "real"]
    states = np.concatenate([case.states for case in ReferenceCases.of(bundle).cases])
    assert (dataset.column(STATE)[:, None] == states).all(axis=2).any(axis=0).all()
    assert any("carries frames" in note for note in found.notes)
    assert not prove(bundle, create_backend("onnxruntime", bundle)).violations


def test_real_frames_can_be_left_out(tmp_path: Path, data: Path) -> None:
    options = {"verify_data": str(data), "real_cases": False}
    found = exported(tmp_path / "a.bundle", miniature.checkpoint(), **options)
    bundle = Bundle.open(found.path)
    assert bundle.manifest.verification is not None
    assert bundle.manifest.verification.cases == "random"
    assert bundle.manifest.verification.observations == "dataset"
    dataset = LeRobotDataset.open(data)
    states = np.concatenate([case.states for case in ReferenceCases.of(bundle).cases])
    assert not (dataset.column(STATE)[:, None] == states).all(axis=2).any()
    assert not any("carries frames" in note for note in found.notes)


@pytest.mark.parametrize(
    ("given", "kinds"), [(("position",), ("position",) * 2), (("angle", "gripper"),) * 2]
)
def test_what_the_user_says_comes_first(
    tmp_path: Path, data: Path, given: Any, kinds: tuple[str, ...]
) -> None:
    options = {"verify_data": str(data), "fps": 30.0, "action_kinds": given}
    found = exported(tmp_path / "a.bundle", miniature.checkpoint(), **options)
    manifest = Bundle.open(found.path).manifest
    assert (manifest.fps, manifest.policy.action_kinds) == (30.0, kinds)


def test_kinds_for_another_action_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="each of the 2 numbers of an action, got 3"):
        exported(tmp_path / "a.bundle", miniature.checkpoint(), action_kinds=("angle",) * 3)


@pytest.mark.parametrize("temperature", [1e-6, 1e-4])
def test_a_nearly_greedy_policy_is_exported(tmp_path: Path, temperature: float) -> None:
    """Near ties, which rounding decides at such a temperature, are no error of the export."""
    checkpoint = miniature.checkpoint(bet_softmax_temperature=temperature)
    bundle = Bundle.open(exported(tmp_path / "a.bundle", checkpoint).path)
    assert bundle.manifest.policy.bet_softmax_temperature == temperature
    prove(bundle, create_backend("onnxruntime", bundle))


def test_every_part_of_the_data_has_both_sides(data: Path) -> None:
    scaling = replace(Affine.identity(2), subtract=np.float32([0, 30]))
    checkpoint = miniature.checkpoint()
    manifest = describe(checkpoint, "fp32")
    samples = load_samples(str(data), manifest, scaling, EPISODES * 16)
    for part in (samples.calibration, samples.held_out, samples.verification):
        sides = {place.episode % 2 for place in part.places}
        assert sides == {0, 1}
