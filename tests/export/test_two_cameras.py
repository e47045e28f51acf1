"""Cameras of different sizes, from the data set to the robot."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import oracle
import pytest
import torch
import torch.nn.functional as F
from two_cameras import RESIZED, SCENE, SIZES, STATE, TINY, WRIST, Trained, config
from vqbet_bench.observations import create_observations
from vqbet_engines.builder import Job, build_plan
from vqbet_export.exporter import ExportConfig, export

from vqbet_edge import BundleError, EdgePolicy, ObservationError, VerificationError
from vqbet_edge.errors import CheckpointError
from vqbet_edge.inspection import main as inspect
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.engine_cache import BuildOptions
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import CropSpec, Precision, encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest
from vqbet_edge.runtime.proof import prove
from vqbet_edge.training import load_checkpoint, train
from vqbet_edge.training.codes.cli import CodesConfig, write_report
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.evaluation.replay import replay

PRECISIONS = ["fp32", *(pytest.param(p, marks=pytest.mark.extended) for p in ("fp16", "int8"))]


def shrunk(frame: np.ndarray, size: tuple[int, int] = RESIZED) -> torch.Tensor:
    """float32 (1, 3, *size) of a frame (H, W, 3): means of whole pixels, the rest interpolated."""
    image = torch.from_numpy(frame)[None].permute(0, 3, 1, 2).float()
    factors = [frame.shape[axis] // size[axis] for axis in (0, 1)]
    return F.interpolate(F.avg_pool2d(image, factors), size, mode="bilinear")


def test_what_is_trained_on_is_said_and_the_way_out_named(
    two_cameras: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short: dict[str, Any] = {"steps": 2, "n_vqvae_training_steps": 1}
    train(config(two_cameras.data, tmp_path / "run", **short))
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out: {TINY} (image of 20x40x3, smaller than 24x32); choose" in said
    assert "it takes one camera, this policy has 2" in said
    assert "it does not know resize_shape" in said
    assert "--resize-shape HEIGHT WIDTH" not in said
    assert load_checkpoint(str(two_cameras.checkpoint)).config.image_keys == (SCENE, WRIST)
    short |= {"resize_shape": None}
    directory = train(config(two_cameras.data, tmp_path / "one", **short))
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out: {WRIST} (image of 48x64x3); choose cameras with --cameras" in said
    assert "cameras of other sizes fit with --resize-shape HEIGHT WIDTH" in said
    assert load_checkpoint(str(directory)).config.image_keys == (SCENE,)
    for refused, reason in (
        (short | {"cameras": (SCENE, WRIST)}, "or shrink all to one with --resize-shape"),
        ({"cameras": (WRIST, TINY)}, rf"does not shrink the 20x40 images of '{TINY}'"),
        ({"resize_shape": (61, 32)}, r"\(61, 32\) does not shrink the 60x108 images"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            train(config(two_cameras.data, tmp_path / "a", **refused))


@pytest.mark.extended
def test_training_sees_shrunk_frames_and_goes_on_exactly(
    two_cameras: Trained, tmp_path: Path
) -> None:
    """As without a cache of frames, and in one go."""
    cache = tmp_path / "cache"
    halves = config(two_cameras.data, tmp_path / "halves", frame_cache=cache, save_every=30)
    train(halves)
    last = tmp_path / "halves/checkpoints/last"
    last.unlink()
    last.symlink_to("000030")
    resumed = train(replace(halves, resume=True))
    for name in (
        "model.safetensors",
        "policy_preprocessor_step_3_normalizer_processor.safetensors",
    ):
        assert (resumed / name).read_bytes() == (two_cameras.checkpoint / name).read_bytes()
    assert sorted(p.name.partition("_")[2] for p in cache.iterdir()) == ["24x32.npy"] * 2
    assert {np.load(path).shape for path in cache.iterdir()} == {(160, *RESIZED, 3)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bundle_proves_itself_and_tensorrt_builds_its_encoder(
    two_cameras: Trained, precision: Precision, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = two_cameras.bundle(precision)
    command = ["vqbet-inspect", str(path), "--prove", "--backend", "onnxruntime"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        inspect()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for part in ("proven on onnxruntime", "(3, 60, 108)", "(3, 48, 64)"):
        assert part in said
    pytest.importorskip("tensorrt_rtx")
    graph = Bundle.open(path).graph("vision_encoder")
    operators = {node.op_type for node in onnx.load_from_string(graph).graph.node}
    assert {"Slice", "AveragePool", "Resize"} <= operators
    assert not {"Shape", "Loop", "If"} & operators
    assert build_plan(graph, Job("tensorrt_rtx", BuildOptions(512), "sm86")).plan


def test_a_camera_in_the_others_place_is_refused_or_seen(two_cameras: Trained) -> None:
    bundle = Bundle.open(two_cameras.bundle("fp32"))
    manifest = bundle.manifest
    with EdgePolicy.load(bundle.path, "onnxruntime") as policy:
        observation = two_cameras.observations()[0]
        exchanged = {**observation, SCENE: observation[WRIST], WRIST: observation[SCENE]}
        expected = rf"'{SCENE}': expected uint8 \(60, 108, 3\) .* got uint8 \(48, 64, 3\)"
        with pytest.raises(ObservationError, match=expected):
            policy.act(exchanged)
        one = {**observation, WRIST: observation[SCENE]}
        with pytest.raises(ObservationError, match=rf"'{WRIST}': expected uint8 \(48, 64, 3\)"):
            policy.act(one)
    features = {key: manifest.input_features[key] for key in (WRIST, SCENE, STATE)}
    changed = msgspec.structs.replace(manifest, input_features=features)
    with pytest.raises(VerificationError, match="vision_encoder"):
        prove(
            replace(bundle, manifest=changed),
            create_backend("onnxruntime", replace(bundle, manifest=changed)),
        )


def test_a_manifest_that_crops_cameras_of_two_sizes_is_refused(two_cameras: Trained) -> None:
    manifest = Bundle.open(two_cameras.bundle("fp32")).manifest
    assert manifest.crop == CropSpec(0, 0, 60, 108)
    for crop in (CropSpec(0, 0, 48, 64), CropSpec(2, 0, 58, 108)):
        changed = msgspec.structs.replace(manifest, crop=crop)
        with pytest.raises(BundleError, match=r"cameras of several sizes .* are not cropped"):
            decode_manifest(encode_manifest(changed))


@pytest.mark.extended
def test_acts_as_lerobot_does_on_shrunk_frames(tmp_path: Path) -> None:
    """LeRobot's own policy, which knows one size only, on what `resize_shape` makes of two."""
    case = oracle.small("shrunk", cameras=2, image=(40, 48), crop_shape=(36, 40), n_obs_steps=3)
    lerobots = oracle.make_policy(case)
    directory = oracle.save_checkpoint(lerobots, case, tmp_path / "checkpoint")
    sizes = dict(zip(case.image_keys, [(90, 160), (60, 80)], strict=True))
    description = json.loads((directory / "config.json").read_text())
    for key, size in sizes.items():
        description["input_features"][key]["shape"] = [3, *size]
    description["resize_shape"] = case.image
    (directory / "config.json").write_text(json.dumps(description))
    (directory / "train_config.json").write_text(json.dumps({"resize_shape": case.image}))
    export(ExportConfig(str(directory), tmp_path / "a.bundle", verify_steps=8))
    judge = oracle.ReferencePolicy(lerobots, case)
    policy = EdgePolicy.load(tmp_path / "a.bundle", "onnxruntime", replan_every=1)
    stats = oracle.make_statistics(case)[oracle.ACTION]
    random = np.random.default_rng(2)
    judge.injected.codes = (3, 5)
    for step in range(6):
        frames = {k: random.integers(0, 256, (*size, 3), np.uint8) for k, size in sizes.items()}
        state = {STATE: oracle.observations(case, step + 1)[step][STATE]}
        small = {k: shrunk(f, case.image)[0].permute(1, 2, 0).numpy() for k, f in frames.items()}
        lerobots._queues["action"].clear()
        expected = judge.act({**small, **state})
        got = policy.act_chunk({**frames, **state}, codes=judge.injected.codes)[0]
        assert np.abs((got - expected) / (stats["max"] - stats["min"]).numpy()).max() <= 1e-4


def test_a_recording_is_replayed_and_its_codes_reported(
    two_cameras: Trained, tmp_path: Path
) -> None:
    bundle = two_cameras.bundle("fp32")
    with EdgePolicy.load(bundle, "onnxruntime", seed=1) as policy:
        recording = policy.record(tmp_path / "seen", decisions=True)
        with recording:
            for observation in two_cameras.observations(1) * 4:
                policy.act(observation)
    for number, source in enumerate((bundle, two_cameras.checkpoint)):
        found = replay(tmp_path / "seen", str(source), "onnxruntime")
        assert (found.decisions, found.differing) == (40, 0)
        output = tmp_path / f"{number}.html"
        write_report(
            CodesConfig(policy=str(source), data=str(tmp_path / "seen"), output=output), None
        )
        assert output.exists()


def test_the_benchmark_observes_every_camera_at_its_size(two_cameras: Trained) -> None:
    bundle = Bundle.open(two_cameras.bundle("fp32"))
    for source in (None, str(two_cameras.data)):
        seen = create_observations(bundle, source)[1]
        assert {key: seen[key].shape for key in (SCENE, WRIST)} == {
            key: (*SIZES[key], 3) for key in (SCENE, WRIST)
        }
        with EdgePolicy.load(bundle.path, "onnxruntime") as policy:
            policy.act(seen)


def test_frames_of_any_source_are_kept_shrunk(two_cameras: Trained) -> None:
    """Of images and of a video, in blocks that do not show; statistics are the recorded ones."""
    pusht = Path(__file__).parents[1] / "data" / "pusht"
    for source, key, size in (
        (two_cameras.data, SCENE, RESIZED),
        (pusht, "observation.image", (40, 44)),
    ):
        plain = LeRobotDataset.open(source)
        small = LeRobotDataset.open(source, resize_shape=size)
        got, recorded = small.frames(key), plain.frames(key)
        assert got.shape == (plain.num_frames, *size, 3)
        for row in (0, 31, 32, 33, plain.num_frames - 1):
            expected = shrunk(recorded[row], size)[0].permute(1, 2, 0).numpy()
            assert np.abs(got[row] - expected).max() <= 0.5 + 1e-4
        np.testing.assert_array_equal(small.episode(1, [key])[key], plain.episode(1, [key])[key])
        names = ("mean", "std", "q01")
        for name, value in plain.statistics(key, names).items():
            np.testing.assert_array_equal(small.statistics(key, names)[name], value)
