"""Whole runs: resuming, interrupts, and LeRobot as a reader."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from sizes import losses, short_run
from workshop import once

from vqbet_edge.errors import CheckpointError, DatasetError, UsageError
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.config import NormalizationMode, TrainConfig, flag
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.metrics import overfitting
from vqbet_edge.training.network import small_backbone
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.objectives import PixelScaling, predict
from vqbet_edge.training.phases import Phase
from vqbet_edge.training.trainer import train
from vqbet_edge.training.windows import WindowedDataset


@pytest.fixture(scope="module")
def whole(pusht: Path, shared: Path) -> Path:
    """A tiny run from the beginning to the end."""
    torch.set_num_threads(1)
    output = shared / "whole"
    return once(output, lambda: train(short_run(pusht, output, frame_cache=shared / "frames")))


def run_python(code: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_a_run_leaves_checkpoints_metrics_and_pictures(whole: Path) -> None:
    assert [path.suffix for path in (whole.parent / "frames").iterdir()] == [".npy"]
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {"000003", "000006", "000008", "000009", "000012", "000015", "000016", "last"}
    assert (whole / "checkpoints/last").resolve().name == "000016"
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "codes.html").read_bytes().startswith(b"<!DOCTYPE html>")
    codes = json.loads((whole / "codes.json").read_text())
    # Of the weights that were saved, on the one episode that was kept for validation.
    assert codes["policy"]["name"] == str(whole / "checkpoints/last/pretrained_model")
    kept = LeRobotDataset.open(codes["data"]).split(0.25, 0).validation
    assert [trace["episode"] for trace in codes["predictions"]["episodes"]] == list(kept)
    kinds = [record["kind"] for record in losses(whole)]
    assert kinds.count("phase 1") == kinds.count("phase 2") == 8
    assert {"codes", "phase 1 validation", "phase 2 validation"} <= set(kinds)
    rates = [record["lr"] for record in losses(whole) if record["kind"] == "phase 2"]
    assert rates[0] == 0
    assert rates[2] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_phase1_touches_no_image(pusht: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pusht, tmp_path / "pusht"))
    video = next(copy.glob("videos/*/*/*.mp4"))
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 100_000] = bytes(100_000)
    video.write_bytes(data)
    output = tmp_path / "run"
    with pytest.raises(DatasetError, match=r"file-000.mp4: episode \d is corrupt"):
        train(short_run(copy, output))
    assert [r["step"] for r in losses(output) if r["kind"] == "phase 1"] == list(range(1, 9))


def killed() -> None:
    raise RuntimeError("killed")


def interrupted() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("step", "ends", "error", "feeding"),
    [
        (4, killed, RuntimeError, {}),
        (13, killed, RuntimeError, {"stream_frames": True, "num_workers": 2}),
        (10, interrupted, KeyboardInterrupt, {"stream_frames": True, "num_workers": 0}),
    ],
)
def test_resuming_is_exact(
    pusht: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    ends: Callable[[], None],
    error: type[BaseException],
    feeding: dict[str, Any],
) -> None:
    """Also where frames are decoded on the way: those of `whole` come from a cache."""
    update = Phase.update

    def ending(phase: Phase, number: int, frames: Any) -> Any:
        if number == step:
            ends()
        return update(phase, number, frames)

    monkeypatch.setattr(Phase, "update", ending)
    with pytest.raises(error):
        train(short_run(pusht, tmp_path / "run", **feeding))
    monkeypatch.undo()
    train(short_run(pusht, tmp_path / "run", resume=True, **feeding))
    assert losses(tmp_path / "run") == losses(whole)
    name = "checkpoints/last/pretrained_model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("mode", ["MIN_MAX", "MEAN_STD"])
def test_lerobot_loads_the_checkpoint_and_computes_the_same(
    pusht: Path,
    tmp_path: Path,
    whole: Path,
    lerobot: Callable[[str], ModuleType],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    directory = whole / "checkpoints/last/pretrained_model"
    if mode == "MEAN_STD":
        options = {"normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), mode)}
        directory = train(
            short_run(pusht, tmp_path / "run", steps=4, n_vqvae_training_steps=2, **options)
        )
    reference = lerobot("policies.vqbet.modeling_vqbet")
    import torchvision

    # LeRobot looks backbones up in torchvision, which has no ResNet as small as the test's.
    def resnet10_small(weights: None) -> torch.nn.Module:  # noqa: ARG001
        head = torch.nn.Identity(), torch.nn.Identity()
        return torch.nn.Sequential(*small_backbone(torch.nn.BatchNorm2d), *head)

    monkeypatch.setattr(torchvision.models, "resnet10_small", resnet10_small, raising=False)
    policy = reference.VQBeTPolicy.from_pretrained(directory).eval()
    pipeline = lerobot("processor").PolicyProcessorPipeline
    converters = lerobot("processor.converters")
    before = pipeline.from_pretrained(directory, config_filename="policy_preprocessor.json")
    after = pipeline.from_pretrained(
        directory,
        config_filename="policy_postprocessor.json",
        to_transition=converters.policy_action_to_transition,
        to_output=converters.transition_to_policy_action,
    )
    ours = load_checkpoint(str(directory))
    episode = LeRobotDataset.open(pusht).episode(0)
    images = torch.from_numpy(episode["observation.image"][:2])
    states = torch.from_numpy(episode["observation.state"][:2])
    pixels = images.permute(0, 3, 1, 2) / 255
    seen = [
        before({"observation.image": pixels[t], "observation.state": states[t]}) for t in range(2)
    ]
    their_images = torch.stack([s["observation.image"] for s in seen], 1)[:, :, None]
    their_states = torch.stack([s["observation.state"] for s in seen], 1)
    # The statistics, in float32 as LeRobot's processors are.
    camera = ours.inputs["observation.image"]
    our_images = PixelScaling([camera])(images[None, :, None])
    # A pixel in [0, 1] is rounded before the factor makes it large.
    rounding = 2 * torch.finfo(torch.float32).eps * float(camera.multiply.max())
    torch.testing.assert_close(our_images, their_images, rtol=1e-6, atol=rounding)
    terms = ours.inputs["observation.state"]
    subtract, multiply, add = map(torch.from_numpy, (terms.subtract, terms.multiply, terms.add))
    our_states = (states[None] - subtract) * multiply + add
    torch.testing.assert_close(our_states, their_states, rtol=1e-6, atol=1e-6)
    # The network and its samples, in float64 from the same numbers.
    batch = {
        "observation.images": their_images.double(),
        "observation.state": their_states.double(),
    }
    request.getfixturevalue("double")
    with torch.no_grad():
        torch.manual_seed(0)
        expected = policy.double().vqbet(batch, rollout=True)
        torch.manual_seed(0)
        features = ours.network.double()(*batch.values())[0]
        chunk = predict(ours.network.head, features, 0.1).chunks[1]
    torch.testing.assert_close(chunk, expected[0], rtol=1e-11, atol=1e-11)
    action = ours.action
    got = (chunk.numpy() - action.subtract) * action.multiply + action.add
    unscaled = after(expected)[0].numpy()
    np.testing.assert_allclose(got, unscaled, rtol=1e-6, atol=1e-6 * action.multiply.max())


def test_defaults_are_lerobots(lerobot: Callable[[str], ModuleType]) -> None:
    reference = lerobot("policies.vqbet.configuration_vqbet").VQBeTConfig
    theirs = reference(device="cpu")
    newer = theirs.pretrained_backbone_weights is not None  # 0.6's, which are one flag away
    ours = TrainConfig(dataset="d", output=Path("o"), imagenet=newer)
    names = [n for n in vars(theirs) if n in vars(ours) and n != "normalization_mapping"]
    assert len(names) > 30
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}
    mapping = {k: v.value for k, v in theirs.normalization_mapping.items()}
    assert {k: v.value for k, v in ours.normalization_mapping.items()} == mapping


def test_phase1_learns_and_stops_early(pusht: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(
        short_run(
            pusht, output, n_vqvae_training_steps=2000, steps=2001, batch_size=32, log_every=2001,
            save_every=5000, validate_every=5000, vqvae_early_stop=True, optimizer_vqvae_lr=1e-2,
        )
    )  # fmt: skip
    codes = [record for record in losses(output) if record["kind"] == "codes"]
    assert codes[-1]["step"] < 2000
    assert codes[-1]["reconstruction_l1"] < 0.06
    assert codes[-1]["reconstruction_l1_action_0"] == pytest.approx(
        codes[-1]["reconstruction_l1"] * 233, rel=0.5
    )
    assert codes[-1]["primary_codes_used"] == 16
    assert codes[-1]["code_pairs_used"] > 100
    assert (output / "checkpoints/last").resolve().name == "002001"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 8}, UsageError, "--steps 8 counts both phases"),
        ({"crop_shape": (97, 97)}, CheckpointError, "does not fit into images of 96x96"),
        ({"dataset": "nowhere"}, DatasetError, "neither a folder nor the id"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    pusht: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(short_run(pusht, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_data_set_without_state_is_refused(pusht: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pusht, tmp_path / "pusht"))
    info = json.loads((copy / "meta/info.json").read_text())
    del info["features"]["observation.state"]
    (copy / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"has no 'observation.state'; its features are"):
        train(short_run(copy, tmp_path / "run"))


def test_windows_are_padded_as_lerobot_pads(
    pusht: Path, tmp_path: Path, lerobot: Callable[[str], ModuleType]
) -> None:
    reference = lerobot("datasets.lerobot_dataset")
    copy = Path(shutil.copytree(pusht, tmp_path / "pusht"))
    identity = dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    config = short_run(copy, tmp_path / "run", normalization_mapping=identity)
    dataset = LeRobotDataset.open(copy)
    policy = config.policy(dataset)
    data = WindowedDataset(dataset, policy, Scalings.of(dataset, policy), torch.device("cpu"))
    frames = np.array([0, 1, 160, 161, 250, 278, 279, 578])
    (batch,) = data.batches([frames])
    deltas = {
        "observation.state": [t / 10 for t in range(-1, 1)],
        "action": [t / 10 for t in range(-1, 7)],
    }
    # The video is left out: LeRobot needs a decoder that torchvision no longer has.
    info = json.loads((copy / "meta/info.json").read_text())
    del info["features"]["observation.image"]
    (copy / "meta/info.json").write_text(json.dumps(info))
    theirs = reference.LeRobotDataset("test/pusht", root=copy, delta_timestamps=deltas)
    for frame, chunks, states in zip(frames, batch.chunks, batch.states, strict=True):
        row = theirs[int(frame)]
        expected = row["action"].unfold(0, policy.action_chunk_size, 1).mT  # (Q, W, A)
        assert torch.equal(expected, chunks)
        assert torch.equal(row["observation.state"], states)


def test_the_documents_example_runs_as_it_stands(pusht: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # The id of the data set on the Hub is a folder here.
    (tmp_path / "lerobot").mkdir()
    (tmp_path / "lerobot" / "pusht").symlink_to(pusht)
    ended = run_python(example, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "torch.Size([1, 7, 512])\n"
    policy = tmp_path / "outputs/pusht/checkpoints/last/pretrained_model"
    assert load_checkpoint(str(policy)).config.vision_backbone == "resnet10_small"


def test_the_public_names_are_there_and_load_torch_only_when_used(
    pusht: Path, tmp_path: Path
) -> None:
    code = """
import sys
import vqbet_edge.training
from vqbet_edge.training.dataset import LeRobotDataset
LeRobotDataset.open(sys.argv[1]).episode(0)
assert "torch" not in sys.modules
for name in vqbet_edge.training.__all__:
    getattr(vqbet_edge.training, name)
assert "torch" in sys.modules
assert not hasattr(vqbet_edge.training, "LeRobot")
"""
    ended = run_python(code, tmp_path, str(pusht))
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("spell", [flag, "--{}".format], ids=["dashes", "lerobots_names"])
def test_flags_are_spelled_both_ways(spell: Callable[[str], str]) -> None:
    args = [
        "--dataset", "d", "--output", "o", spell("n_vqvae_training_steps"), "9",
        spell("crop_shape"), "None", f"{spell('normalization_mapping')}.VISUAL", "MEAN_STD",
        spell("no_use_group_norm"),
    ]  # fmt: skip
    config = tyro.cli(TrainConfig, args=args)
    assert (config.n_vqvae_training_steps, config.crop_shape) == (9, None)
    assert config.normalization_mapping["VISUAL"] is NormalizationMode.MEAN_STD
    assert not config.use_group_norm


def test_help_spells_flags_with_dashes(tmp_path: Path) -> None:
    code = "import sys; from vqbet_edge.training.cli import main; main()"
    ended = run_python(code, tmp_path, "--help")
    assert ended.returncode == 0, ended.stderr
    flags = re.findall(r"(?<![\w-])--[a-z][\w.-]*", ended.stdout)
    assert len(flags) > 10
    assert not [name for name in flags if "_" in name.partition(".")[0]]


def learning(training: list[float], validation: list[float]) -> list[dict[str, object]]:
    kinds = {"phase 2": training, "phase 2 validation": validation}
    return [
        {"step": 100 * step, "kind": kind, "primary": loss}
        for kind, losses in kinds.items()
        for step, loss in enumerate(losses)
    ]


def test_memorising_is_said() -> None:
    """The course of a run on 206 people's demonstrations, and of one that goes well."""
    said = overfitting(learning([1.0, 0.6, 0.4] + 10 * [0.2], [1.0, 0.66, 0.70, 0.73]))
    assert "0.20 on them and 0.73 on those kept for validation" in said
    assert "lowest (0.66) at step 100" in said
    assert overfitting(learning([1.0, 0.6, 0.55], [1.0, 0.66, 0.64])) == ""
    assert overfitting(learning([1.0] + 10 * [0.2], [1.0, 0.33, 0.32])) == ""  # not yet
    assert overfitting(learning([1.0], [])) == ""  # nothing is kept for validation
