"""Replay: a recording's decisions come out the same, but for what was planted."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import int8
import miniature
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from vqbet_export.exporter import ExportConfig, export
from workshop import Workshop, once

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import ObservationError, UsageError
from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.recorded import Recording
from vqbet_edge.training import backend
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.evaluation.cli import main
from vqbet_edge.training.evaluation.replay import Replay, replay

IMAGE, STATE = "observation.image", "observation.state"
OFFSETS = "vqbet.action_head.map_to_cbet_preds_offset"
PLANTED = 0.4  # of a normalised action, whose range is 2
PRECISIONS = ["fp32", "fp16", pytest.param("int8", marks=pytest.mark.extended)]


@dataclass(frozen=True)
class Replayed:
    """A policy and its recording, and the same policy with one code pair's offsets changed.

    Attributes:
        code: the primary code whose offsets `changed` moves by `PLANTED`.
    """

    checkpoint: Path
    changed: Path
    recording: Path
    code: int
    bundle: Callable[[Path, Precision], Path]


@pytest.fixture(scope="module")
def replayed(workshop: Workshop, shared: Path) -> Replayed:
    root = shared / "replay"
    root.mkdir(exist_ok=True)
    checkpoint = workshop.checkpoint(int8.CASE)

    def bundle(path: Path, precision: Precision) -> Path:
        if path == checkpoint and precision != "int8":
            return workshop.bundle(int8.CASE, precision).bundle
        output = root / f"{path.name}-{precision}.bundle"
        config = ExportConfig(str(path), output, precision, verify_steps=64)
        if precision == "int8":
            calibration = {"calibration_data": str(int8.PUSHT), "calibration_steps": 64}
            config = replace(config, **calibration, targets=("cpu",))
        return once(output, lambda: export(config))

    seen = once(root / "seen", lambda: record(bundle(checkpoint, "fp32"), root / "seen"))
    episodes = Recording(seen).episodes
    codes = [int(d.codes[0]) for episode in episodes for d in episode.decisions.values()]
    # One that is there, but not everywhere.
    code = min(set(codes), key=codes.count)
    changed = once(root / "changed", lambda: change(checkpoint, root / "changed", code))
    return Replayed(checkpoint, changed, seen, code, bundle)


def record(bundle: Path, folder: Path) -> None:
    """What the policy decides on two episodes of PushT."""
    policy, dataset = EdgePolicy.load(bundle), LeRobotDataset.open(int8.PUSHT)
    with policy.record(folder, decisions=True):
        for number in range(2):
            episode = dataset.episode(number)
            policy.reset(seed=number)
            for frame, state in zip(episode[IMAGE][:40], episode[STATE][:40], strict=True):
                policy.act({IMAGE: frame, STATE: state})


def change(checkpoint: Path, target: Path, code: int) -> Path:
    """A checkpoint whose primary code `code` has other offsets."""
    shutil.copytree(checkpoint, target)
    path = target / "model.safetensors"
    with safe_open(path, "numpy") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    last = max(key for key in tensors if key.startswith(OFFSETS) and key.endswith("bias"))
    # (layer, code, chunk x action)
    shape = (2, int8.CASE.fields.get("vqvae_n_embed", 16), -1)
    tensors[last].reshape(shape)[0, code] += PLANTED
    save_file(tensors, path, metadata)
    return target


def run(replayed: Replayed, source: Path, folder: Path | None = None) -> Replay:
    return replay(folder or replayed.recording, str(source), "onnxruntime")


def decisions(folder: Path) -> list[tuple[str, Any]]:
    episodes = Recording(folder).episodes
    return [(f"episode {e.number}", d) for e in episodes for d in e.decisions.values()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_policy_decides_the_same(replayed: Replayed, precision: Precision) -> None:
    found = run(replayed, replayed.bundle(replayed.checkpoint, precision))
    assert found.decisions == len(decisions(replayed.recording)) == 16
    assert (found.differing, found.first, found.skipped) == (0, None, 0)
    if precision == "fp32":
        assert found.near_ties == 0
        assert found.largest_action < 1e-6


def test_its_checkpoint_decides_the_same(replayed: Replayed) -> None:
    """PyTorch against the recorded ONNX Runtime, on all decisions."""
    found = run(replayed, replayed.checkpoint)
    assert (found.decisions, found.differing, found.near_ties) == (16, 0, 0)
    assert found.largest_action < 1e-4
    assert 0 < found.largest_probability < 1e-4
    assert found.replayed.endswith("fp32 on torch")


@pytest.mark.parametrize(
    "precision",
    [None, *(pytest.param(p, marks=pytest.mark.extended) for p in get_args(Precision))],
)
def test_a_changed_weight_is_found_and_nothing_else(
    replayed: Replayed, precision: Precision | None
) -> None:
    """In a bundle of any precision and in the checkpoint itself."""
    source = replayed.bundle(replayed.changed, precision) if precision else replayed.changed
    found = run(replayed, source)
    expected = [
        (name, d) for name, d in decisions(replayed.recording) if d.codes[0] == replayed.code
    ]
    assert 0 < len(expected) < 16
    assert found.differing == len(expected)
    name, decision = expected[0]
    assert found.first is not None
    assert (found.first.episode, found.first.step) == (name, decision.step)
    assert f"first that differs:\n{name}, step {decision.step}\n" in str(found)
    unit = np.abs(load_backend(str(source))[0].arrays["action.multiply"])
    rounding = {"fp16": 1e-2, "int8": 0.25}.get(precision or "", 1e-3)
    np.testing.assert_allclose(found.first.actions, PLANTED * unit, rtol=rounding)


def edited(replayed: Replayed, tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    folder = shutil.copytree(replayed.recording, tmp_path / "edited")
    path = min(folder.iterdir())
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = {key: array.copy() for key, array in load_file(path).items()}
    edit(arrays)
    save_file(arrays, path, metadata)
    return folder


@pytest.mark.parametrize("what", ["codes", "code_probabilities", "action_chunk"])
def test_an_edited_decision_is_found_with_its_window(
    replayed: Replayed, tmp_path: Path, what: str
) -> None:
    def edit(arrays: dict[str, Any]) -> None:
        values = arrays[f"decision.{what}"][0]
        if what == "codes":
            values[0] = (values[0] + 8) % 16
        elif what == "code_probabilities":
            values[...] = np.eye(16)[arrays["decision.codes"][0]]
        else:
            values[...] += 100.0  # of about 500

    folder = edited(replayed, tmp_path, edit)
    found = run(replayed, replayed.bundle(replayed.checkpoint, "fp16"), folder)
    name, decision = decisions(folder)[0]
    assert (found.differing, found.near_ties) == (1, 0)
    first = found.first
    assert first is not None
    assert (first.episode, first.step) == (name, decision.step)
    assert first.recorded == decision.codes.tolist()
    # The first observation fills the window.
    assert first.window == [0] * len(first.window)
    assert len(first.window) > 1
    states = Recording(folder).episodes[0].states
    np.testing.assert_array_equal(first.states, [states[0]] * len(first.window))


@pytest.mark.parametrize(("moved", "near_ties", "differing"), [(1e-4, 1, 0), (3e-3, 0, 1)])
def test_a_near_tie_is_one_that_rounding_decides(
    replayed: Replayed, tmp_path: Path, moved: float, near_ties: int, differing: int
) -> None:
    """A probability moves to the next code, and the random number is where it was."""

    def edit(arrays: dict[str, Any]) -> None:
        for row, (code, _) in enumerate(arrays["decision.codes"]):
            layer = arrays["decision.code_probabilities"][row, 0]
            if layer[code] > 2 * moved and code < 15:
                arrays["decision.draws"][row, 0] = layer[: code + 1].sum() - moved / 2
                layer[[code, code + 1]] += [-moved, moved]
                return
        raise AssertionError

    folder = edited(replayed, tmp_path, edit)
    found = run(replayed, replayed.bundle(replayed.checkpoint, "fp32"), folder)
    assert (found.near_ties, found.differing) == (near_ties, differing)
    tie = found.first_near_tie or found.first
    assert tie is not None
    assert tie.probability == pytest.approx(moved, rel=0.01)


def test_a_window_that_was_not_recorded_is_skipped(replayed: Replayed, tmp_path: Path) -> None:
    """A recording that begins in the middle of an episode."""
    bundle = replayed.bundle(replayed.checkpoint, "fp32")
    policy, episode = EdgePolicy.load(bundle), LeRobotDataset.open(int8.PUSHT).episode(0)
    seen = [{IMAGE: f, STATE: s} for f, s in zip(episode[IMAGE], episode[STATE], strict=True)]
    chunk = policy.manifest.policy.action_chunk_size
    for observation in seen[: chunk - 2]:
        policy.act(observation)
    with policy.record(tmp_path / "seen", decisions=True):
        for observation in seen[chunk - 2 : 3 * chunk]:
            policy.act(observation)
    found = run(replayed, bundle, tmp_path / "seen")
    assert (found.skipped, found.decisions, found.differing) == (1, 1, 0)


def test_forced_codes_are_no_difference(replayed: Replayed, tmp_path: Path) -> None:
    bundle, random = replayed.bundle(replayed.checkpoint, "fp32"), np.random.default_rng(0)
    episode = LeRobotDataset.open(int8.PUSHT).episode(0)
    with EdgePolicy.load(bundle) as policy, policy.record(tmp_path / "seen", decisions=True):
        for frame, state in zip(episode[IMAGE][:6], episode[STATE][:6], strict=True):
            policy.act_chunk({IMAGE: frame, STATE: state}, codes=random.integers(16, size=2))
    found = run(replayed, bundle, tmp_path / "seen")
    assert (found.decisions, found.differing, found.near_ties) == (6, 0, 0)


def test_another_policy_is_refused(replayed: Replayed, mini: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="policy of the same configuration"):
        run(replayed, mini)
    other_robot = miniature.checkpoint(vqvae_n_embed=16)
    with (
        mock.patch.object(backend, "load_checkpoint", return_value=other_robot),
        pytest.raises(ObservationError, match="expected uint8"),
    ):
        run(replayed, tmp_path)


def test_the_command(
    replayed: Replayed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(replayed.changed), "--replay", str(replayed.recording), "--json"]
    monkeypatch.setattr(sys, "argv", ["vqbet-eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["first"]["recorded"][0] == replayed.code
