"""Choices before training: cameras, pretrained weights, and what LeRobot will say to the result."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torchvision
from sizes import short_run

from vqbet_edge.errors import CheckpointError, HubError, UsageError, VQBeTEdgeError
from vqbet_edge.training import TrainConfig, load_checkpoint, train
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.layouts import lerobots_objections, save_pretrained
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings

STATE = "observation.state"
FRONT, WRIST, SMALL_ONE, DEPTH = (
    f"observation.images.{name}" for name in ("front", "wrist", "small", "depth")
)
SIZES = {SMALL_ONE: 24, FRONT: 40, WRIST: 40, DEPTH: 40}


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A robot with four cameras: a small one, two of one size, and depth."""
    random = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("cameras") / "data"
    demonstrations = [
        {
            **{k: random.integers(0, 256, (8, s, s, 3), np.uint8) for k, s in SIZES.items()},
            STATE: random.normal(size=(8, 3)).astype(np.float32),
            "action": random.normal(size=(8, 2)).astype(np.float32),
        }
        for _ in range(3)
    ]
    write_dataset(root, demonstrations, 10.0, "x")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][DEPTH] |= {"shape": [40, 40, 1], "info": {"is_depth_map": True}}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def config(dataset: Path, output: Path, **changes: object) -> TrainConfig:
    options = {"steps": 6, "n_vqvae_training_steps": 3, "validation_fraction": 0.0}
    return short_run(dataset, output, **{**options, "crop_shape": (32, 32), **changes})


def test_what_fits_together_is_taken_and_what_is_left_out_is_said(
    cameras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = train(config(cameras, tmp_path / "run"))
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out: {SMALL_ONE} (image of 24x24x3); choose cameras with --cameras" in said
    assert f"left out: {DEPTH} (a depth map of 40x40x1)" in said
    assert "LeRobot cannot load this policy's checkpoints: it takes one camera, this" in said
    assert "it does not know the backbone resnet10_small" in said
    assert load_checkpoint(str(policy)).config.image_keys == (FRONT, WRIST)


def test_cameras_as_asked_for(cameras: Path, tmp_path: Path) -> None:
    for keys in ((WRIST, FRONT), (SMALL_ONE,)):
        dataset = LeRobotDataset.open(cameras, cameras=keys)
        made = config(cameras, tmp_path, cameras=keys, crop_shape=None).policy(dataset)
        assert made.image_keys == keys
    dataset = LeRobotDataset.open(cameras, cameras=(FRONT, SMALL_ONE))
    with pytest.raises(CheckpointError, match=r"cameras of one shape .* one size with --cameras"):
        config(cameras, tmp_path, crop_shape=None).policy(dataset)


@pytest.mark.parametrize(
    ("changes", "lerobots", "ours"),
    [
        ({}, None, []),
        ({"cameras": (FRONT, WRIST)}, ValueError, ["takes one camera"]),
        # An error of the library that reads its configuration.
        ({"resize_shape": (36, 36)}, Exception, ["resize_shape"]),
        ({"vision_backbone": "resnet10_small"}, AttributeError, ["resnet10_small"]),
    ],
)
def test_lerobot_objects_where_we_say_so(
    cameras: Path, tmp_path: Path, changes: dict[str, Any], lerobots: Any, ours: list[str]
) -> None:
    """LeRobot's own loader on what the trainer writes."""
    chosen = config(
        cameras, tmp_path, **{"vision_backbone": "resnet18", "cameras": (FRONT,), **changes}
    )
    dataset = LeRobotDataset.open(cameras, cameras=chosen.cameras)
    policy = chosen.policy(dataset)
    save_pretrained(tmp_path, VQBeT(policy), chosen, Scalings.of(dataset, policy), {"fps": 10})
    objections = lerobots_objections(policy)
    assert len(objections) == len(ours)
    assert all(part in text for part, text in zip(ours, objections, strict=True))
    reference = oracle.lerobot("policies.vqbet.modeling_vqbet").VQBeTPolicy
    with pytest.raises(lerobots) if lerobots else nullcontext():
        reference.from_pretrained(tmp_path)


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache, empty, and no network."""

    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_weights_in_torchs_cache_start_the_backbone(
    cameras: Path, tmp_path: Path, torch_home: Path
) -> None:
    torch.manual_seed(3)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, torch_home / "resnet18-f37072fd.pth")
    dataset = LeRobotDataset.open(cameras)
    chosen = config(cameras, tmp_path / "run", vision_backbone="resnet18", imagenet=True)
    network = VQBeT(chosen.policy(dataset)).state_dict()
    for name, place in (("conv1.weight", "0.weight"), ("layer4.1.bn2.bias", "7.1.bn2.bias")):
        assert torch.equal(network[f"vqbet.rgb_encoder.backbone.{place}"], weights[name])
    train(chosen)
    # Going on needs them no more, and the checkpoint names none: LeRobot would download them.
    (torch_home / "resnet18-f37072fd.pth").unlink()
    more: dict[str, Any] = {"steps": 7, "resume": True}
    more |= {"vision_backbone": "resnet18", "imagenet": True}
    directory = train(config(cameras, tmp_path / "run", **more))
    written = json.loads((directory / "config.json").read_text())
    assert written["pretrained_backbone_weights"] is None


NAME = "ResNet18_Weights.IMAGENET1K_V1"
BATCH_NORM = {"vision_backbone": "resnet18", "use_group_norm": False}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vision_backbone": "resnet18", "pretrained_backbone_weights": NAME}, VQBeTEdgeError,
         "--no-use-group-norm"),
        ({"use_group_norm": False, "pretrained_backbone_weights": NAME}, VQBeTEdgeError,
         "resnet10_small"),
        ({"imagenet": True}, UsageError, "no ImageNet weights for resnet10_small"),
        ({**BATCH_NORM, "pretrained_backbone_weights": "ResNet18_Weights.FOO"}, UsageError,
         "has for resnet18: ResNet18_Weights.IMAGENET1K_V1"),
        ({**BATCH_NORM, "pretrained_backbone_weights": NAME}, HubError,
         r"from .*resnet18-f37072fd.pth \(Name or service.*\); download https://.* there"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_are_refused_before_training(
    cameras: Path,
    tmp_path: Path,
    torch_home: Path,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    assert not any(torch_home.iterdir())
    with pytest.raises(error, match=message) as refused:
        train(config(cameras, tmp_path / "run", **changes))
    assert refused.value.exit_code != 5  # type: ignore[attr-defined]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["truncated", "code"])
def test_damaged_weights_are_not_run(
    cameras: Path, tmp_path: Path, torch_home: Path, kind: str
) -> None:
    path = torch_home / "resnet18-f37072fd.pth"
    torch.save({"a": Poison() if kind == "code" else torch.zeros(999)}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(HubError, match="it is damaged: delete it"):
        train(config(cameras, tmp_path / "run", **BATCH_NORM, pretrained_backbone_weights=NAME))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


class Poison:
    """Unpickled, it ends the program."""

    def __reduce__(self) -> Any:
        return exit, (1,)
