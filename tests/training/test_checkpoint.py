"""The loader: three layouts, every rule about them, and everything it refuses."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor
from vqbet_export.exporter import ExportConfig, export

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import CheckpointError
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.layouts import Layout
from vqbet_edge.training.normalization import scale_images

FIXTURE = Path(__file__).parents[1] / "data" / "lerobot_0_3_3"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Tensors = dict[str, Tensor]


@pytest.fixture
def layout_0_4(workshop: Any, tmp_path: Path) -> Path:
    """A copy of what LeRobot 0.4.4 wrote."""
    return Path(shutil.copytree(workshop.checkpoint(TINY), tmp_path / "policy"))


@pytest.fixture
def layout_0_2(workshop: Any, tmp_path: Path) -> Path:
    """LeRobot 0.3.3's config and tensor names, as that version wrote them."""
    fixture = json.loads((FIXTURE / "fixture.json").read_text())
    config = json.loads((FIXTURE / CONFIG).read_text())
    case = oracle.small(
        "layout_0_2", image=(40, 48), crop_shape=(36, 40), gpt_n_layer=1, gpt_block_size=32
    )
    tensors = load_file(workshop.checkpoint(case) / WEIGHTS)
    owners = {"normalize_inputs": oracle.STATE, "normalize_targets": oracle.ACTION}
    owners["unnormalize_outputs"] = oracle.ACTION
    for owner, key in owners.items():
        for name in ("min", "max"):
            value = torch.tensor(fixture["statistics"][key][name])
            tensors[f"{owner}.buffer_{key.replace('.', '_')}.{name}"] = value
    assert {name: list(t.shape) for name, t in tensors.items()} == fixture["tensors"]
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def layout_0_1(layout_0_2: Path) -> Path:
    """The same weights with the flat config of v0.1, whose cameras had statistics too."""
    config = json.loads((layout_0_2 / CONFIG).read_text())
    for name in ("type", "input_features", "output_features", "normalization_mapping"):
        del config[name]
    config["input_shapes"] = {"observation.image": [3, 40, 48], oracle.STATE: [2]}
    config["output_shapes"] = {oracle.ACTION: [2]}
    config["input_normalization_modes"] = {"observation.image": "mean_std", oracle.STATE: "min_max"}
    config["output_normalization_modes"] = {oracle.ACTION: "min_max"}
    (layout_0_2 / CONFIG).write_text(json.dumps(config))
    prefix = "normalize_inputs.buffer_observation_image."
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    change_weights(
        layout_0_2,
        lambda t: t.update(
            {f"{prefix}mean": mean.view(3, 1, 1), f"{prefix}std": std.view(3, 1, 1)}
        ),
    )
    return layout_0_2


def change_weights(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def step(processor: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in processor["steps"] if s["registry_name"] == name)
    return found


def test_layout_0_4_goes_by_what_its_processors_say(layout_0_4: Path) -> None:
    """Modes, names on the robot, and in which file the statistics of a step are."""
    old = next(layout_0_4.glob("policy_preprocessor_step_*.safetensors"))
    old.rename(layout_0_4 / "other.safetensors")

    def change(processor: dict[str, Any]) -> None:
        found = step(processor, "normalizer_processor")
        found["config"]["norm_map"]["STATE"] = "MEAN_STD"
        found["state_file"] = "other.safetensors"
        processor["steps"].insert(0, processor["steps"].pop(processor["steps"].index(found)))
        rename = step(processor, "rename_observations_processor")["config"]
        rename["rename_map"] = {"robot.qpos": oracle.STATE}

    change_json(layout_0_4 / "policy_preprocessor.json", change)
    checkpoint = load_checkpoint(str(layout_0_4))
    stats = oracle.make_statistics(TINY)[oracle.STATE]
    x = (stats["mean"] + 2 * stats["std"]).numpy()
    np.testing.assert_allclose(checkpoint.inputs[oracle.STATE].apply(x), [2, 2], rtol=1e-5)
    assert checkpoint.renamed == {oracle.STATE: "robot.qpos"}


def test_layout_0_2_normalises_as_lerobot_0_3_3_did(layout_0_2: Path) -> None:
    # It would read as `observation.state.extra` from name to key.
    name = "normalize_inputs.buffer_observation_state_extra.min"
    change_weights(layout_0_2, lambda t: t.update({name: torch.zeros(9)}))
    checkpoint = load_checkpoint(str(layout_0_2))
    assert checkpoint.layout is Layout.V0_2
    recorded = json.loads((FIXTURE / "fixture.json").read_text())
    for scaling, name in (
        (checkpoint.inputs[oracle.STATE], "normalized"),
        (checkpoint.action, "unnormalized"),
    ):
        x = np.array(recorded[name]["input"], np.float32)
        expected = recorded[name]["output"]
        np.testing.assert_allclose(scaling.apply(x), expected, rtol=1e-6, atol=1e-6)


def test_layout_0_1_reads_flat_shapes_and_modes_per_feature(layout_0_1: Path) -> None:
    # The state projector of those days has the width that its tensor says.
    change_json(layout_0_1 / CONFIG, lambda c: c["input_shapes"].update({oracle.STATE: [5]}))
    checkpoint = load_checkpoint(str(layout_0_1))
    assert checkpoint.config.state_dim == 2
    assert checkpoint.layout is Layout.V0_1
    image = checkpoint.inputs["observation.image"]
    np.testing.assert_allclose(image.subtract, [0.4, 0.5, 0.6], rtol=1e-6)
    np.testing.assert_allclose(image.multiply, [5, 4, 1 / 0.3], rtol=1e-6)
    recorded = json.loads((FIXTURE / "fixture.json").read_text())["unnormalized"]
    x = np.array(recorded["input"], np.float32)
    np.testing.assert_allclose(checkpoint.action.apply(x), recorded["output"], rtol=1e-6)


def test_what_a_checkpoint_may_have_besides(layout_0_4: Path) -> None:
    """Fields from the future, other sizes than the tensors', indices of before mid-2024, names of
    wrappers, half precision.
    """
    wrong = {"gpt_hidden_dim": 999, "vqvae_n_embed": 3, "gpt_n_layer": 77, "use_group_norm": True}
    change_json(layout_0_4 / CONFIG, lambda c: c.update(wrong, gpt_n_head=4, from_the_future=[1]))
    expected = load_file(layout_0_4 / WEIGHTS)["vqbet.action_token"].half()
    tensors = load_file(layout_0_4 / WEIGHTS)
    tensors["vqbet.select_target_actions_indices"] = torch.zeros(3, 3, dtype=torch.int64)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file({f"module._orig_mod.{k}": v for k, v in tensors.items()}, layout_0_4 / WEIGHTS)
    network = load_checkpoint(str(layout_0_4 / WEIGHTS)).network
    config, trunk = network.config, network.vqbet
    assert (config.gpt_hidden_dim, config.vqvae_n_embed, config.gpt_n_layer) == (64, 16, 2)
    assert not config.use_group_norm
    assert trunk.select_target_actions_indices.shape == (7, 5)
    assert torch.equal(trunk.action_token, expected.float())


def test_of_several_outputs_the_action_is_taken_as_lerobot_does(layout_0_4: Path) -> None:
    expected = load_checkpoint(str(layout_0_4)).action
    extra = {"action.ee_pose": {"type": "ACTION", "shape": [6]}}
    change_json(layout_0_4 / CONFIG, lambda c: c["output_features"].update(extra))
    for processor, kind in (("pre", "normalizer"), ("post", "unnormalizer")):
        change_json(
            layout_0_4 / f"policy_{processor}processor.json",
            lambda p, kind=kind: step(p, f"{kind}_processor")["config"]["features"].update(extra),
        )
    checkpoint = load_checkpoint(str(layout_0_4))
    assert set(checkpoint.inputs) == {"observation.image", oracle.STATE}
    np.testing.assert_array_equal(checkpoint.action.multiply, expected.multiply)


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"])
@pytest.mark.parametrize("constant", [False, True])
def test_every_mode_normalises_as_lerobot(layout_0_4: Path, mode: str, constant: bool) -> None:
    """Processors that LeRobot makes and writes, with a feature that may be constant."""
    types = oracle.lerobot("configs.types")
    reference = oracle.make_policy(TINY)
    reference.config.normalization_mapping = {
        "VISUAL": types.NormalizationMode[mode],
        "STATE": types.NormalizationMode[mode],
        "ACTION": types.NormalizationMode[mode],
    }
    stats = statistics_for_every_mode(constant)
    module = oracle.lerobot("policies.vqbet.processor_vqbet")
    before, after = module.make_vqbet_pre_post_processors(reference.config, stats)
    before.save_pretrained(layout_0_4)
    after.save_pretrained(layout_0_4)
    checkpoint = load_checkpoint(str(layout_0_4))
    assert checkpoint.layout is Layout.V0_4
    random = np.random.default_rng(0)
    image = random.uniform(0, 1, (3, 40, 48)).astype(np.float32)
    for state in random.uniform(-50, 600, (8, 2)).astype(np.float32):
        batch = before(
            {"observation.image": torch.from_numpy(image), oracle.STATE: torch.from_numpy(state)}
        )
        got = checkpoint.inputs[oracle.STATE].apply(state)
        np.testing.assert_allclose(got, batch[oracle.STATE][0].numpy(), rtol=1e-5, atol=1e-5)
        got = scale_images(torch.from_numpy(image), checkpoint.inputs["observation.image"])
        np.testing.assert_allclose(got, batch["observation.image"][0], rtol=1e-5, atol=1e-5)
        action = state / 300 - 1
        expected = after(torch.from_numpy(action)[None])[0].numpy()
        np.testing.assert_allclose(checkpoint.action.apply(action), expected, rtol=1e-5, atol=1e-4)


def statistics_for_every_mode(constant: bool) -> dict[str, dict[str, Tensor]]:
    names = ("min", "q01", "q10", "mean", "q90", "q99", "max")
    stats = {}
    for key, width in ((oracle.STATE, 2), (oracle.ACTION, 2), ("observation.image", 3)):
        random = torch.Generator().manual_seed(width)
        steps = torch.rand((len(names), width), generator=random).cumsum(0)
        values = dict(zip(names, steps if width == 3 else 100 * steps, strict=True))
        values["std"] = torch.rand(width, generator=random) + 0.1
        if constant:
            for name in (*names, "std"):
                values[name][1] = 0.0 if name == "std" else 0.5
        shape = (3, 1, 1) if width == 3 else (2,)
        stats[key] = {name: value.reshape(shape).clone() for name, value in values.items()}
    return stats


def config(change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda directory: change_json(directory / CONFIG, change)


def weights(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    return lambda directory: change_weights(directory, change)


def before(change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda directory: change_json(directory / "policy_preprocessor.json", change)


def after(change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda directory: change_json(directory / "policy_postprocessor.json", change)


def state_files(directory: Path, change: Callable[[Path], object]) -> None:
    for path in directory.glob("policy_preprocessor_step_*.safetensors"):
        change(path)


EFFORT = {"observation.effort": {"type": "STATE", "shape": [7]}}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no type": (
        config(lambda c: c.pop("type")),
        r"config.json' does not say .* add the line \"type\": \"vqbet\"",
    ),
    "no state": (
        config(lambda c: c["input_features"].pop(oracle.STATE)),
        r"no feature 'observation.state' that VQ-BeT could use; it has observation.image",
    ),
    "other policy": (config(lambda c: c.update(type="act")), r"type 'act', expected 'vqbet'"),
    "not discretised": (
        weights(lambda t: t["vqbet.action_head.vqvae_model.discretized"].fill_(False)),
        r"not trained yet .*saved after n_vqvae_training_steps",
    ),
    "tensor unknown": (
        weights(lambda t: t.update({"vqbet.extra": torch.zeros(1)})),
        r"does not fit config.json.*vqbet.extra",
    ),
    "not finite": (
        weights(lambda t: t["vqbet.action_token"].fill_(torch.nan)),
        r"'vqbet.action_token' is not finite; the training diverged",
    ),
    "truncated": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]),
        r"no safetensors file or is truncated",
    ),
    "a clone without its large files": (
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid x"),
        r"it is a Git LFS pointer, not the file; in .* type: git lfs pull",
    ),
    "config without features": (
        config(lambda c: c.pop("input_features")),
        r"lack or misuse 'input_features'",
    ),
    "backbone unknown": (
        config(lambda c: c.update(vision_backbone="vit_b_16")),
        r"vision_backbone 'vit_b_16' is unknown",
    ),
    "second state": (
        config(lambda c: c["input_features"].update(EFFORT)),
        r"'observation.effort' is of type 'STATE'.* LeRobot cannot run the policy either",
    ),
    "statistics missing": (
        lambda d: state_files(d, lambda p: save_file({"other.min": torch.zeros(1)}, p)),
        r"'observation.state' is normalised by MIN_MAX, but the checkpoint has no 'min'",
    ),
    "state file missing": (lambda d: state_files(d, Path.unlink), r"statistics belong into it"),
    "step twice": (
        before(lambda p: p["steps"].append(p["steps"][-1])),
        r"has two steps 'normalizer_processor'",
    ),
    "no way back for the action": (
        after(lambda p: p["steps"].remove(step(p, "unnormalizer_processor"))),
        r"has no 'unnormalizer_processor' to turn it back",
    ),
    "eps no number": (
        before(lambda p: step(p, "normalizer_processor")["config"].update(eps="tiny")),
        r"lack or misuse",
    ),
    "step unknown": (
        before(lambda p: p["steps"].append({"registry_name": "my_filter", "config": {}})),
        r"has the step 'my_filter', which is unknown here",
    ),
    "licence no plain text": (
        config(lambda c: c.update(license="MIT\x1b[2J")),
        r"config.json: license: .*correct it, or null",
    ),
    "mode unknown": (
        before(lambda p: step(p, "normalizer_processor")["config"]["norm_map"].update(STATE="LOG")),
        r"normalisation mode 'LOG' is unknown",
    ),
    "mode null": (
        before(lambda p: step(p, "normalizer_processor")["config"]["norm_map"].update(STATE=None)),
        r"normalisation mode None is unknown",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(layout_0_4: Path, name: str) -> None:
    spoil, message = REFUSED[name]
    spoil(layout_0_4)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(layout_0_4))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "it is sharded"),
        (["pytorch_model_fsdp_0", "__0_0.distcp"], "it is sharded"),
        (["pytorch_model.bin"], "pickled weights are never loaded"),
        (["readme.txt"], "it holds"),
        (
            ["metrics.jsonl", "checkpoints/last/pretrained_model/model.safetensors"],
            "pass '.*checkpoints/last/pretrained_model'",
        ),
    ],
)
def test_names_what_is_wrong_with_a_directory(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(tmp_path))


def test_missing_path_says_what_to_pass() -> None:
    with pytest.raises(CheckpointError, match=r"pass a model.safetensors, its directory, or a Hub"):
        load_checkpoint("nowhere/at/all")


def test_robot_passes_the_keys_that_the_processor_renames(layout_0_4: Path, tmp_path: Path) -> None:
    before(
        lambda p: step(p, "rename_observations_processor")["config"].update(
            rename_map={"robot.qpos": oracle.STATE}
        )
    )(layout_0_4)
    export(ExportConfig(str(layout_0_4), tmp_path / "a.bundle", verify_steps=4))
    with EdgePolicy.load(tmp_path / "a.bundle") as policy:
        image = np.full((40, 48, 3), 90, np.uint8)
        action = policy.act({"observation.image": image, "robot.qpos": np.full(2, 20, np.float32)})
        assert np.isfinite(action).all()
        assert policy.manifest.state_key == "robot.qpos"


def test_a_resize_that_we_did_not_train_is_warned_of(layout_0_4: Path) -> None:
    change_json(layout_0_4 / CONFIG, lambda c: c.update(resize_shape=[38, 44]))
    with pytest.warns(UserWarning, match="differs from an antialiased resize by up to 0.17"):
        checkpoint = load_checkpoint(str(layout_0_4))
    assert checkpoint.config.encoder_shape == (36, 40)
    # LeRobot's own file of that name nests the policy; ours does not.
    lerobots = {"dataset": {"repo_id": "a/b"}, "policy": {"resize_shape": [38, 44]}}
    (layout_0_4 / "train_config.json").write_text(json.dumps(lerobots))
    with pytest.warns(UserWarning, match="vqbet-train did not write this checkpoint"):
        load_checkpoint(str(layout_0_4))

    # One of our own is not.
    (layout_0_4 / "train_config.json").write_text(json.dumps({"resize_shape": [38, 44]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(str(layout_0_4)).config.resize_shape == (38, 44)


def test_an_unreachable_hub_is_no_disk_error(tmp_path: Path) -> None:
    """The command's own process, without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    code = "from vqbet_edge.training.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--dataset", "no_such/data", "--output", "r"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "does not exist here, and cannot be read from the Hub" in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
