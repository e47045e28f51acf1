"""Actions as distances from the state, from the data set to the robot."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sizes import short_run
from workshop import once

from vqbet_edge import BundleError, EdgePolicy, Guards
from vqbet_edge.errors import CheckpointError, DatasetError
from vqbet_edge.inspection import main as inspect
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest
from vqbet_edge.training import TrainConfig, load_checkpoint, train
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.codes.policies import CodedPolicy
from vqbet_edge.training.codes.report import examine_codes
from vqbet_edge.training.config import NormalizationMode, VQBeTConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.samples import open_source
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.normalization import RANGE, STATISTICS, Scalings, relative_advice
from vqbet_edge.training.windows import WindowedDataset

STATE, ACTION, IMAGE = miniature.STATE, "action", miniature.IMAGE
FREE = Guards(action_limits=None)


def config(data: Path, output: Path, **changes: Any) -> TrainConfig:
    options = {"steps": 4, "n_vqvae_training_steps": 2, "use_relative_actions": True}
    return short_run(data, output, **{**options, **changes})


@pytest.fixture(scope="module")
def trained(pusht: Path, shared: Path) -> Path:
    output = shared / "relative"
    once(output, lambda: train(config(pusht, output)))
    return output / "checkpoints/last/pretrained_model"


@pytest.mark.parametrize("mode", NormalizationMode)
def test_a_chunk_and_its_state_make_the_demonstrated_actions(
    pusht: Path, tmp_path: Path, mode: NormalizationMode
) -> None:
    names = ("y",) if mode is NormalizationMode.MIN_MAX else ()
    mapping = dict.fromkeys(("VISUAL", "STATE", "ACTION"), mode) | {
        "VISUAL": NormalizationMode.IDENTITY
    }
    options = {"normalization_mapping": mapping, "relative_exclude_joints": names}
    dataset = LeRobotDataset.open(pusht)
    policy = config(pusht, tmp_path, **options).policy(dataset)
    scalings = Scalings.of(dataset, policy)
    data = WindowedDataset(dataset, policy, scalings, torch.device("cpu"))
    frames = np.array([0, 1, 160, 161, 250, 278, 279, 578])
    chunks = scalings.backward[ACTION].apply(data.chunks(frames).numpy())  # (B, Q, W, A)
    first = np.repeat(dataset.bounds[:-1], np.diff(dataset.bounds))[frames, None]
    last = np.repeat(dataset.bounds[1:] - 1, np.diff(dataset.bounds))[frames, None]
    begins = frames[:, None] - 1 + np.arange(policy.num_queries)
    states = dataset.column(STATE)[begins.clip(first, frames[:, None])]  # the newest it can know
    times = (begins[:, :, None] + np.arange(policy.action_chunk_size)).clip(
        first[:, None], last[:, None]
    )
    relative = [True, not names]
    expected = dataset.column(ACTION)[times] - np.where(relative, states, 0)[:, :, None]
    np.testing.assert_allclose(chunks, expected, atol=2e-3)
    if mode is not NormalizationMode.IDENTITY:
        normalized = data.chunks(np.arange(dataset.num_frames))[:, policy.n_obs_steps - 1].numpy()
        first_statistic = STATISTICS[mode][0]
        aim = 0 if mode is NormalizationMode.MEAN_STD else -1
        got = {
            "mean": normalized.mean((0, 1), dtype=np.float64),
            "min": normalized.min((0, 1)),
            "q01": np.quantile(normalized, 0.01, (0, 1)),
            "q10": np.quantile(normalized, 0.1, (0, 1)),
        }[first_statistic]
        np.testing.assert_allclose(got, aim, atol=1e-4)


def test_a_policy_adds_the_state_that_it_predicted_on(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    observations = [miniature.observation(random) for _ in range(12)]
    options: dict[str, Any] = {"use_relative_actions": True, "action_names": ("a", "b_Gripper")}
    checkpoint = miniature.checkpoint(**options)
    bundle = miniature.write(tmp_path / "relative.bundle", checkpoint)
    assert Bundle.open(bundle).manifest.policy.relative_actions == (True, False)
    for path, said in ((bundle, True), (mini, False)):
        monkeypatch.setattr(sys, "argv", ["vqbet-inspect", str(path)])
        with pytest.raises(SystemExit) as ended:
            inspect()
        assert ended.value.code == 0
        assert ("relative to the state" in capsys.readouterr().out) == said
    assert b"relative_actions" not in (mini / "manifest.json").read_bytes()
    with (
        EdgePolicy.load(bundle, "onnxruntime", temperature=0, guards=FREE, prove=True) as relative,
        EdgePolicy.load(mini, "onnxruntime", temperature=0, guards=FREE) as absolute,
    ):
        for step, seen in enumerate(observations):
            got, other = relative.act(seen), absolute.act(seen)
            if step % checkpoint.config.action_chunk_size == 0:
                base = seen[STATE] * [1, 0]  # of the whole chunk, whatever the state is later
            np.testing.assert_allclose(got - base, other, atol=1e-4)


def test_what_is_trained_is_loaded_and_examined(trained: Path, pusht: Path, tmp_path: Path) -> None:
    dataset, checkpoint = LeRobotDataset.open(pusht), load_checkpoint(str(trained))
    policy = checkpoint.config
    assert policy.relative_actions == (True, True)
    assert policy.action_names == dataset.features[ACTION].names == ("x", "y")
    (path,) = trained.glob("policy_postprocessor_step_*.safetensors")
    stored = {name for name in load_file(path) if name.startswith("action.")}
    assert stored == {"action.min", "action.max", "action.lowest", "action.highest"}
    scalings = Scalings.of(dataset, config(pusht, tmp_path).policy(dataset))
    np.testing.assert_array_equal(checkpoint.action.multiply, scalings.backward[ACTION].multiply)
    actions = dataset.column(ACTION)
    lowest_and_highest = np.stack([actions.min(0), actions.max(0)])
    limits = checkpoint.action_scaling.limits
    assert limits is not None
    np.testing.assert_array_equal(limits, lowest_and_highest)
    # `vqbet-codes` sees the demonstrated chunks as training did.
    policy_of_it = CodedPolicy("", *load_backend(str(trained)))
    found = examine_codes(policy_of_it, open_source(pusht), 50).demonstrations
    assert found is not None
    chunks = scalings.backward[ACTION].apply(
        WindowedDataset(dataset, policy, scalings, torch.device("cpu"))
        .chunks(np.arange(dataset.num_frames))[:, policy.n_obs_steps - 1]
        .numpy()
    )
    spread = np.abs(chunks - chunks.mean(0)).mean((0, 1))
    np.testing.assert_allclose(found.spread, spread, rtol=1e-4)


def test_a_bundle_clamps_to_the_range_that_the_robot_takes(tmp_path: Path) -> None:
    limits = np.array([[-1, 12], [1, 20]], np.float32)
    checkpoint = miniature.checkpoint(use_relative_actions=True)
    how = checkpoint.normalization["action"]
    stats = {**how.stats, **dict(zip(RANGE, limits, strict=True))}
    scalings = {**checkpoint.normalization, "action": replace(how, stats=stats)}
    checkpoint = replace(checkpoint, normalization=scalings)
    bundle = miniature.write(tmp_path / "a.bundle", checkpoint)
    random = np.random.default_rng(0)
    with EdgePolicy.load(bundle, "onnxruntime", guards=Guards(margin=0)) as policy:
        for _ in range(20):
            action = policy.act(miniature.observation(random))
            assert (limits[0] <= action).all()
            assert (action <= limits[1]).all()
        assert policy.guard_counts.clamped


def test_names_decide_as_lerobots_do() -> None:
    base = miniature.checkpoint(use_relative_actions=True).config
    assert base.relative_actions == (True, True)
    named = replace(base, action_names=("arm.pos", "left_GRIPPER.pos"))
    assert named.relative_actions == (True, False)
    assert replace(named, relative_exclude_joints=()).relative_actions == (True, True)
    assert replace(named, relative_exclude_joints=("ARM",)).relative_actions == (False, True)
    assert replace(named, use_relative_actions=False).relative_actions == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"action_names": ("x",)}, "names of 2 actions, got 1"),
        (
            {"action_names": ("x", "y"), "relative_exclude_joints": ("x", "y")},
            "leaves none of the actions x, y relative",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    change: dict[str, Any], says: str
) -> None:
    base: VQBeTConfig = miniature.checkpoint(use_relative_actions=True).config
    with pytest.raises(CheckpointError, match=says):
        replace(base, **change)


def rewritten(pusht: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """The demonstrations with other states."""
    data = LeRobotDataset.open(pusht)
    seen = [data.episode(i) for i in range(data.num_episodes)]
    write_dataset(target, [{**e, STATE: change(e[STATE])} for e in seen], data.fps, "push")
    return target


def test_states_that_the_actions_are_no_positions_of_are_refused(
    pusht: Path, tmp_path: Path
) -> None:
    narrow = rewritten(pusht, tmp_path / "narrow", lambda states: states[:, :1])
    with pytest.raises(CheckpointError, match="there are 2 actions and 1 states"):
        train(config(narrow, tmp_path / "a"))
    radians = rewritten(pusht, tmp_path / "radians", lambda states: states / 512)
    for mode in ("MIN_MAX", "IDENTITY"):  # whatever is made of the numbers
        mapping = dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode[mode])
        with pytest.raises(DatasetError, match="it is no position of what that state holds"):
            train(config(radians, tmp_path / "b", normalization_mapping=mapping))


def test_where_they_would_help_is_said(pusht: Path, tmp_path: Path) -> None:
    radians = rewritten(pusht, tmp_path / "radians", lambda states: states / 512)
    for data, relative, said in (
        (pusht, False, True),
        (pusht, True, False),
        (radians, False, False),
    ):
        dataset = LeRobotDataset.open(data)
        policy = config(data, tmp_path, use_relative_actions=relative).policy(dataset)
        assert bool(relative_advice(dataset, policy)) == said


def swap(steps: list[dict[str, Any]]) -> None:
    steps[-1], steps[-2] = steps[-2], steps[-1]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("post", lambda s: s.pop(1), "do not agree on whether actions are relative"),
        ("pre", lambda s: s[3]["config"].update(enabled=False), "do not agree"),
        ("pre", swap, "expected the steps relative_actions_processor and normalizer_processor, in"),
    ],
)
def test_processors_that_would_act_otherwise_are_refused(
    trained: Path, tmp_path: Path, name: str, change: Callable[..., None], says: str
) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    path = copy / f"policy_{name}processor.json"
    described = json.loads(path.read_text())
    change(described["steps"])
    path.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(str(copy))


def test_a_manifest_says_which_of_all_actions(mini: Path) -> None:
    manifest = decode_manifest((mini / "manifest.json").read_bytes())
    policy = msgspec.structs.replace(manifest.policy, relative_actions=(True,))
    with pytest.raises(BundleError, match="expected relative_actions for 2 actions"):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, policy=policy)))
