"""Pictures that are changed while training, beside LeRobot."""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from demonstrated import demonstrations
from sizes import short_run

from vqbet_edge.errors import UsageError
from vqbet_edge.training.augmentation import Augmentation
from vqbet_edge.training.config import ImageTransforms, TrainConfig
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.phases import PolicyPhase
from vqbet_edge.training.trainer import train


def lerobots() -> Any:
    try:
        import lerobot.transforms  # noqa: F401 - where 0.6 has it
    except ImportError:
        return oracle.lerobot("datasets.transforms")
    return oracle.lerobot("transforms")


@pytest.mark.parametrize("options", [{}, {"max_num_transforms": 6, "random_order": True}])
def test_defaults_and_draws_are_lerobots(options: dict[str, Any]) -> None:
    reference = lerobots()
    theirs = reference.ImageTransforms(reference.ImageTransformsConfig(enable=True, **options))
    ours = Augmentation(ImageTransforms(enable=True, **options), seed=0)
    window = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 48), np.uint8))
    changed = []
    for seed in range(12):
        torch.manual_seed(seed)
        expected = theirs(window)
        torch.manual_seed(seed)
        assert torch.equal(ours.change(window), expected)
        changed.append(not torch.equal(expected, window))
    assert all(changed)


def test_what_is_drawn_follows_from_seed_step_and_sample() -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (3, 2, 2, 40, 48, 3), np.uint8))
    change, frames = Augmentation(ImageTransforms(enable=True), seed=0), np.array([4, 7, 90])
    before = torch.get_rng_state()
    changed = change(images, 5, frames)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(change(images[1:2], 5, frames[1:2])[0], changed[1])
    assert not torch.equal(change(images, 6, frames), changed)
    alike = change(images[:1].expand(2, -1, -1, -1, -1, -1), 5, frames[:2])
    assert not torch.equal(alike[0], alike[1])
    assert change(images, 5, frames).dtype == torch.uint8


@pytest.mark.usefixtures("without_report")
def test_a_run_with_changed_pictures_is_resumed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = demonstrations(tmp_path / "data")
    options = {"steps": 6, "n_vqvae_training_steps": 2, "save_every": 3, "validate_every": 100}

    def run(name: str, **changes: Any) -> TrainConfig:
        chosen = {"image_transforms": ImageTransforms(enable=True), **options, **changes}
        return short_run(data, tmp_path / name, **chosen)

    def weights(name: str) -> bytes:
        path = tmp_path / name / "checkpoints/last/pretrained_model/model.safetensors"
        return path.read_bytes()

    train(run("whole"))
    train(run("plain", image_transforms={"enable": False}))
    update = PolicyPhase.update

    def killed(phase: PolicyPhase, step: int, frames: Any) -> Any:
        if step == 4:
            raise RuntimeError("killed")
        return update(phase, step, frames)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyPhase, "update", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(run("halves"))
    with pytest.raises(UsageError, match="--image-transforms"):
        train(run("halves", resume=True, image_transforms=ImageTransforms()))
    train(run("halves", resume=True))
    assert weights("halves") == weights("whole") != weights("plain")
    first, *_ = (r for r in read_metrics(tmp_path / "plain/metrics.jsonl") if r["step"] == 2)
    (same,) = (r for r in read_metrics(tmp_path / "whole/metrics.jsonl") if r == first)
    assert same["kind"] == "phase 1"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"brightnes": (1, 2)}, "image_transforms.*brightnes"),
        ({"brightness": (1.2, 0.8)}, r"image_transforms.brightness goes from 1.2 to 0.8"),
        ({"hue": (-0.6, 0)}, "hue.*Expected `float` >= -0.5"),
        ({"max_num_transforms": 0}, "max_num_transforms.*>= 1"),
    ],
)
def test_what_transforms_do_not_take_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(dataset="d", output=Path("o"), image_transforms=value)
