"""One step as a GPU wants it: whole graphs, bfloat16, crops of bytes, and no waiting."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import SMALL, losses, short_run
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.config import Feature, FeatureType, VQBeTConfig
from vqbet_edge.training.draws import Shard
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.objectives import PolicyObjective, VqVaeObjective
from vqbet_edge.training.phases import Phase
from vqbet_edge.training.trainer import train

KEYS = "observation.image", "observation.state", "action"
SHARD = Shard(1, 4, 8)


def objective(*, each: bool = False, **changes: Any) -> PolicyObjective:
    options = SMALL | {"n_obs_steps": 2, "crop_shape": (40, 32), "resize_shape": (48, 48)}
    config = VQBeTConfig(
        input_features={
            KEYS[0]: Feature(FeatureType.VISUAL, (3, 96, 96)),
            KEYS[1]: Feature(FeatureType.STATE, (2,)),
        },
        output_features={KEYS[2]: Feature(FeatureType.ACTION, (2,))},
        **options | changes,
    )
    torch.manual_seed(0)
    scalings = Scalings({key: Affine.identity(3) for key in KEYS}, {}, {})
    return PolicyObjective(VQBeT(config), scalings, crop_per_sample=each).train()


def batch(size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 2, 1, 48, 48, 3), generator=random, dtype=torch.uint8)
    states = torch.rand(size, 2, 2, generator=random)
    return images, states, torch.rand(size, 4, 5, 2, generator=random)


@pytest.fixture(autouse=True)
def quick(without_report: None) -> None:  # noqa: ARG001
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("training", "shard", "sequential"),
    [(True, None, False), (True, SHARD, True), (False, None, True)],
)
def test_a_step_compiles_to_one_graph(
    training: bool, shard: Shard | None, sequential: bool
) -> None:
    torch._dynamo.reset()
    module = objective(sequentially_select=sequential, each=sequential).train(training)
    module.network.head.vqvae_model.requires_grad_(False)
    found = []
    for compiled in (False, True):
        if compiled:
            module.compile(backend="eager", fullgraph=True)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.stack(module(*batch(), shard)))
    assert torch.equal(*found)


def test_what_codes_and_coordinates_mean_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    module = objective(dropout=0.0)
    precise = module.network.head.vqvae_model, module.network.vqbet.rgb_encoder.pool
    seen: dict[str, set[torch.dtype]] = {"inside": set(), "outside": set()}
    linear = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = linear(x, weight, bias)
        inside = any(weight is p for p in precise[0].parameters())
        seen["inside" if inside else "outside"].add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    pooled: list[Tensor] = []
    precise[1].register_forward_hook(lambda *found: pooled.append(found[2]))
    phase1 = VqVaeObjective(precise[0], lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16):
        module(*batch())
        phase1(batch()[2].flatten(0, 1))
    assert seen == {"inside": {torch.float32}, "outside": {torch.bfloat16}}
    assert pooled[0].dtype == torch.float32


def test_bf16_learns_what_float32_learns(pusht: Path, tmp_path: Path) -> None:
    options = {"steps": 8, "n_vqvae_training_steps": 4, "save_every": 100, "dropout": 0.0}
    for precision in ("no", "bf16"):
        train(short_run(pusht, tmp_path / precision, mixed_precision=precision, **options))
    full, half = (losses(tmp_path / name) for name in ("no", "bf16"))
    assert [r for r in half if "2" not in r["kind"]] == [r for r in full if "2" not in r["kind"]]
    mixed = [(a, b) for a, b in zip(full, half, strict=True) if a["kind"] == "phase 2"]
    assert any(a["primary"] != b["primary"] for a, b in mixed)
    for a, b in mixed:
        assert (b["primary"], b["secondary"]) == pytest.approx((a["primary"], a["secondary"]), 0.02)


@pytest.mark.parametrize("random", [True, False])
def test_images_are_cropped_before_they_are_scaled(random: bool) -> None:
    module = objective(crop_is_random=random)
    sizes: list[torch.Size] = []
    module.pixels.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    backbone: list[Tensor] = []
    encoder = module.network.vqbet.rgb_encoder
    encoder.backbone.register_forward_pre_hook(lambda _, args: backbone.append(args[0]))
    images = batch()[0]
    for training in (True, False):
        module.train(training)(*batch())
        if not (training and random):  # the centre, to the bit
            whole = module.pixels.forward(images).flatten(0, 2)
            assert torch.equal(backbone[-1], encoder.center_crop(whole))
    assert sizes == 2 * [(3, 2, 1, 40, 32, 3)]
    assert all(seen.shape == (6, 3, 40, 32) for seen in backbone)


@pytest.mark.parametrize("each", [False, True])
def test_no_update_waits_for_the_device(
    pusht: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: bool
) -> None:
    update, waits = Phase.update, dict[str, list[str]]()

    def watched(phase: Phase, step: int, *arguments: Any) -> Any:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            losses = update(phase, step, *arguments)
        for event in found.events():
            parents, parent = [event.name], event.cpu_parent
            while parent is not None:
                parents.append(parent.name)
                parent = parent.cpu_parent
            # These two look at their arguments on a CPU only.
            harmless = {"aten::one_hot", "aten::_fused_adam_"} & {*parents}
            if event.name == "aten::_local_scalar_dense" and not harmless:
                waits.setdefault(phase.name, []).append(" < ".join(parents))
        return losses

    monkeypatch.setattr(Phase, "update", watched)
    options = {"ema_decay": 0.0, "sequentially_select": each, "crop_per_sample": each}
    train(short_run(pusht, tmp_path / "run", steps=4, n_vqvae_training_steps=2, **options))
    assert waits == {}


def test_parts_of_a_batch_are_the_batch(pusht: Path, tmp_path: Path) -> None:
    options = {"steps": 6, "n_vqvae_training_steps": 3, "batch_size": 8, "save_every": 100}
    for count in (1, 4):
        parts = {"gradient_accumulation_steps": count, "crop_per_sample": True}
        train(short_run(pusht, tmp_path / str(count), **options, **parts))
    with pytest.raises(UsageError, match="--batch-size 8 is not a multiple of 3"):
        train(short_run(pusht, tmp_path / "3", gradient_accumulation_steps=3, **options))
    whole, parts = (losses(tmp_path / name) for name in ("1", "4"))
    for expected, got in zip(whole, parts, strict=True):
        assert got.pop("kind") == expected.pop("kind")
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_small_crops_and_divided_batch_norm_are_said(
    pusht: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = []
    for norm, crop in ((False, (66, 96)), (True, (68, 96))):
        options = {"use_group_norm": norm, "crop_shape": crop, "gradient_accumulation_steps": 2}
        train(short_run(pusht, tmp_path / str(norm), steps=2, n_vqvae_training_steps=1, **options))
        said.append(" ".join(capfd.readouterr().err.split()))
    assert "crop of 66x96 is less than 0.7 of the 96x96 images" in said[0]
    assert "BatchNorm takes the 2 windows that are computed at once" in said[0]
    assert "crop of" not in said[1]
    assert "BatchNorm" not in said[1]
