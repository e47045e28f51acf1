"""Runs that begin from another policy."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from demonstrated import demonstrations
from safetensors.numpy import load_file
from sizes import short_run
from workshop import Workshop, once

from vqbet_edge.errors import CheckpointError, DatasetError, UsageError
from vqbet_edge.training import trainer
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.cli import parsed
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.pretrained import pretrained_fields
from vqbet_edge.training.trainer import train

STATISTICS = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, without_report: None) -> None:  # noqa: ARG001
    monkeypatch.setenv("COLUMNS", "500")


@pytest.fixture(scope="module")
def before(shared: Path) -> Path:
    """A policy of other demonstrations."""
    root = shared / "before"

    def make() -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("write_report", "draw_curves", "text"):
                patch.setattr(trainer, name, lambda *_: "")
            train(short_run(demonstrations(root / "data"), root / "run", **OPTIONS))

    once(root, make)
    return root / "run/checkpoints/last/pretrained_model"


@pytest.fixture(scope="module")
def new(shared: Path) -> Path:
    """New demonstrations, of actions that go further."""
    return once(shared / "new", lambda: demonstrations(shared / "new", high=3))


OPTIONS: dict[str, Any] = {"steps": 4, "n_vqvae_training_steps": 2, "scheduler_warmup_steps": 1}


def fine_tuning(source: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    run = {"dataset": str(data), "output": output, "steps": 4, "batch_size": 4, "log_every": 1}
    run |= {"scheduler_warmup_steps": 1, "ema_decay": 0.5}
    return TrainConfig(**{**pretrained_fields(str(source)), **run, **changes})


def test_phase_2_goes_on_with_weights_codes_and_statistics(
    before: Path, new: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate of zero, the policy that comes out is the one that went in."""
    output = train(fine_tuning(before, new, tmp_path / "run", optimizer_lr=0))
    theirs, ours = load_checkpoint(str(before)), load_checkpoint(str(output))
    for name, tensor in theirs.network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], tensor), name
    for name in ("multiply", "add", "subtract"):
        np.testing.assert_array_equal(getattr(ours.action, name), getattr(theirs.action, name))
    # What a robot may do is what either has shown.
    assert ours.action_range is not None
    shown = LeRobotDataset.open(new).column("action").max(axis=0)
    np.testing.assert_array_equal(ours.action_range[1], shown)
    kinds = [record["kind"] for record in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert "phase 1" not in kinds
    assert kinds.count("phase 2") == 4
    said = " ".join(capfd.readouterr().err.split())
    assert f"beginning with {before}" in said
    assert said.count("and in what the checkpoint was trained on from") == 2


def test_what_is_resumed_does_not_need_the_checkpoint_that_it_began_with(
    before: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(before, tmp_path / "before"))
    train(fine_tuning(own, new, tmp_path / "whole"))
    config = fine_tuning(own, new, tmp_path / "halves", save_every=2)
    update = trainer.PolicyPhase.update

    def killed(phase: Any, step: int, frames: Any) -> Any:
        if step == 3:
            raise RuntimeError("killed")
        return update(phase, step, frames)

    monkeypatch.setattr(trainer.PolicyPhase, "update", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(config)
    monkeypatch.setattr(trainer.PolicyPhase, "update", update)
    shutil.rmtree(own)
    arguments = ["--dataset", str(new), "--resume"]  # which knows what it began with
    arguments += ["--output", str(config.output), "--steps", "4", "--batch-size", "4"]
    arguments += ["--log-every", "1", "--scheduler-warmup-steps", "1", "--ema-decay", "0.5"]
    monkeypatch.setattr(sys, "argv", ["vqbet-train", *arguments])
    train(parsed().train)
    for name in ("model.safetensors", STATISTICS):
        halves, whole = (
            (tmp_path / run / "checkpoints/last/pretrained_model" / name).read_bytes()
            for run in ("halves", "whole")
        )
        assert halves == whole


def test_codes_can_be_learned_further_by_new_statistics(
    before: Path, new: Path, tmp_path: Path
) -> None:
    changes = {"n_vqvae_training_steps": 2, "new_statistics": True, "ema_decay": 0.0}
    changes |= {"optimizer_vqvae_lr": 0.0, "optimizer_lr": 0.0}
    output = train(fine_tuning(before, new, tmp_path / "run", **changes))
    ours, theirs = load_checkpoint(str(output)), load_checkpoint(str(before))
    lowest = LeRobotDataset.open(new).column("action").min(axis=0)
    np.testing.assert_allclose(ours.action.apply(np.full(2, -1, np.float32)), lowest, rtol=1e-6)
    embed = "vqbet.action_head.vqvae_model.vq_layer.layers.0._codebook.embed"
    for name, tensor in theirs.network.state_dict().items():
        if "_codebook" not in name:  # at learning rates of zero, only the codebooks move
            assert torch.equal(ours.network.state_dict()[name], tensor), name
    assert not torch.equal(*(policy.network.state_dict()[embed] for policy in (ours, theirs)))


def test_the_end_of_phase_1_is_a_vqvae_but_no_policy(
    before: Path, new: Path, tmp_path: Path
) -> None:
    ended = before.parents[1] / "000002/pretrained_model"
    with pytest.raises(CheckpointError, match="saved during phase 1"):
        pretrained_fields(str(ended))
    source = pretrained_fields(str(ended), vqvae_alone=True)
    ours = load_checkpoint(str(train(short_run(new, tmp_path / "run", **{**source, "steps": 1}))))
    theirs = load_file(ended / "model.safetensors")
    name = "vqbet.action_head.vqvae_model.vq_layer.layers.0._codebook.embed"
    np.testing.assert_array_equal(ours.network.state_dict()[name], theirs[name])


def test_a_vqvae_can_be_taken_alone(before: Path, tmp_path: Path) -> None:
    data = demonstrations(tmp_path / "data", state=5, camera="wrist", high=2)
    source = pretrained_fields(str(before), vqvae_alone=True)
    config = short_run(data, tmp_path / "run", **{**source, "steps": 2, "gpt_n_layer": 2})
    ours, theirs = load_checkpoint(str(train(config))), load_checkpoint(str(before))
    for name, tensor in theirs.network.head.vqvae_model.state_dict().items():
        assert torch.equal(ours.network.head.vqvae_model.state_dict()[name], tensor), name
    np.testing.assert_array_equal(ours.action.multiply, theirs.action.multiply)
    assert ours.config.gpt_n_layer == 2
    stored = load_file(tmp_path / "run/checkpoints/last/pretrained_model" / STATISTICS)
    column = LeRobotDataset.open(data).column("observation.state")
    np.testing.assert_array_equal(stored["observation.state.min"], column.min(axis=0))


def test_a_policy_of_lerobots_is_taken(workshop: Workshop, tmp_path: Path) -> None:
    source = workshop.checkpoint(oracle.TINY)
    data = demonstrations(tmp_path / "data", size=oracle.TINY.image)
    changes = {"steps": 1, "optimizer_lr": 0, "cameras": ["observation.images.front"]}
    output = train(fine_tuning(source, data, tmp_path / "run", **changes))
    ours, theirs = load_checkpoint(str(output)), load_checkpoint(str(source))
    for name, tensor in theirs.network.named_parameters():
        assert torch.equal(ours.network.get_parameter(name), tensor), name
    scalings = zip(ours.inputs.values(), theirs.inputs.values(), strict=True)
    for own, scaling in (*scalings, (ours.action, theirs.action)):
        np.testing.assert_allclose(own.multiply, scaling.multiply, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpt_n_layer": 2}, "--gpt-n-layer 1, and the run is to have 2; leave --gpt-n-layer out"),
        ({"normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), "MEAN_STD")},
         "VISUAL IDENTITY, and the run is to have MEAN_STD"),
        ({"new_statistics": True}, "pass --n-vqvae-training-steps N too"),
        ({"pretrained_vqvae": "other"}, "leave --pretrained-vqvae out"),
        ({"pretrained": None, "n_vqvae_training_steps": 2, "new_statistics": True},
         "--new-statistics is for --pretrained"),
    ],
)  # fmt: skip
def test_what_contradicts_the_checkpoint_is_refused(
    before: Path, new: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(fine_tuning(before, new, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_data_of_another_robot_are_refused(before: Path, tmp_path: Path) -> None:
    cut = demonstrations(tmp_path / "cut", state=1)
    with pytest.raises(UsageError, match=r"a state of 2, and .*cut has 1; pass data of the same"):
        train(fine_tuning(before, cut, tmp_path / "run"))
    wrist = demonstrations(tmp_path / "wrist", camera="wrist")
    with pytest.raises(DatasetError, match=r"has no camera 'observation.images.front'; it has"):
        train(fine_tuning(before, wrist, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    # A camera by another name is named.
    train(fine_tuning(before, wrist, tmp_path / "run", cameras=["observation.images.wrist"]))


def test_the_command_line_takes_the_checkpoints_hyperparameters(
    before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: str) -> TrainConfig:
        needed = ["vqbet-train", "--dataset", "d", "--output", "o"]
        monkeypatch.setattr(sys, "argv", [*needed, *arguments])
        return parsed().train

    config = command("--pretrained", str(before), "--recipe", "small", "--steps", "9")
    policy = load_checkpoint(str(before)).config
    assert (config.gpt_hidden_dim, config.crop_shape) == (policy.gpt_hidden_dim, policy.crop_shape)
    assert (config.n_vqvae_training_steps, config.steps) == (0, 9)
    assert config.optimizer_lr == 1e-3  # the recipe's
    alone = command(f"--pretrained_vqvae={before}", "--recipe", "small")
    assert (alone.vqvae_embedding_dim, alone.gpt_hidden_dim) == (policy.vqvae_embedding_dim, 128)
    assert alone.normalization_mapping["VISUAL"] == "MEAN_STD"
