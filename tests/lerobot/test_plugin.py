"""The plugin in this process: rows, seeds, options, refusals."""

import gc
import json
import shutil
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import oracle
import pytest
import torch
from peers import PUSHT, Robot

from vqbet_edge import BundleError, EdgePolicy, Guards, ObservationError, UsageError
from vqbet_edge.errors import HistoryError
from vqbet_edge.runtime.recorded import Recording
from vqbet_edge.runtime.recording_format import Outcome

oracle.lerobot("policies.factory")

from lerobot.configs.policies import PreTrainedConfig  # noqa: E402
from lerobot.policies.factory import get_policy_class, make_pre_post_processors  # noqa: E402
from lerobot_policy_vqbet_edge import (  # noqa: E402
    VqbetEdgeConfig,
    VqbetEdgePolicy,
    make_vqbet_edge_pre_post_processors,
    modeling_vqbet_edge,
)

IMAGE, STATE = "observation.image", "observation.state"


def load(bundle: Path, *flags: str) -> Any:
    config = PreTrainedConfig.from_pretrained(bundle, cli_overrides=list(flags))
    config.pretrained_path = bundle
    return get_policy_class(config.type).from_pretrained(bundle, config=config)


def batches(steps: int, rows: int) -> list[dict[str, torch.Tensor]]:
    """Every row sees something else."""
    seen = [oracle.observations(oracle.small("row", seed=row), steps) for row in range(rows)]
    found = []
    for step in range(steps):
        images, states = (np.stack([row[step][key] for row in seen]) for key in (IMAGE, STATE))
        planar = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        # LeRobot passes the task along.
        found.append({IMAGE: planar, STATE: torch.from_numpy(states), "task": "push"})
    return found  # type: ignore[return-value]


def row(batch: dict[str, torch.Tensor], index: int) -> dict[str, Any]:
    return {key: batch[key][index].numpy() for key in (IMAGE, STATE)}


def test_every_row_is_a_policy_of_its_own(robot: Robot) -> None:
    """Bitwise what a policy loaded alone with the seed of the row does, batch after batch."""
    policy = load(robot.bundle, "--seed=7", "--replan_every=3")
    alone = [EdgePolicy.load(robot.bundle, seed=7 + r, replan_every=3) for r in range(3)]
    for rows in (3, 2):
        policy.reset()
        for single in alone:
            single.reset()
        for step, batch in enumerate(batches(6, rows)):
            if step == 4:  # LeRobot after 0.6.1 asks for it where the task changes
                policy.drop_queued_actions()
                for single in alone:
                    single.drop_queue()
            actions = policy.select_action(batch)
            assert actions.dtype == torch.float32
            expected = [alone[r].act(row(batch, r)) for r in range(rows)]
            np.testing.assert_array_equal(actions.numpy(), np.stack(expected))
        chunks = policy.predict_action_chunk(batch).numpy()
        for number, chunk in enumerate(chunks):
            np.testing.assert_array_equal(chunk, alone[number].act_chunk(row(batch, number)))
        assert len(policy.rows) == rows


def test_a_batch_of_another_size_takes_a_reset(robot: Robot) -> None:
    policy = load(robot.bundle)
    (two,), (three,) = batches(1, 2), batches(1, 3)
    policy.select_action(two)
    with pytest.raises(UsageError, match=r"expected a batch of 2, as since reset\(\), got 3"):
        policy.select_action(three)
    policy.reset()
    assert policy.select_action(three).shape == (3, 2)


def test_a_row_that_fails_stops_all_rows_until_reset(robot: Robot) -> None:
    policy = load(robot.bundle)
    (batch,) = batches(1, 2)
    broken = {**batch, STATE: batch[STATE].clone()}
    broken[STATE][1, 0] = torch.nan
    with pytest.raises(ObservationError, match="expected finite values"):
        policy.select_action(broken)
    with pytest.raises(HistoryError, match=r"some rows of the batch had acted; call reset\(\)"):
        policy.select_action(batch)
    policy.reset()
    policy.select_action(batch)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({IMAGE: torch.full((1, 3, 96, 96), 2.0)}, ObservationError, "expected float32 values"),
        ({IMAGE: torch.zeros(1, 3, 480, 640)}, ObservationError, "height and width to 96 and 96"),
        ({IMAGE: torch.zeros(3, 96, 96)}, ObservationError, "expected a batch of"),
        ({STATE: torch.zeros(1, 6)}, ObservationError, r"a batch of \(2,\), got \(1, 6\)"),
        ({STATE: torch.zeros(2, 2)}, ObservationError, "expected one batch size, got"),
        ({IMAGE: None}, ObservationError, "name the robot's camera as in training, or rename it"),
        ({STATE: torch.zeros(1, 2, device="meta")}, UsageError, "a tensor on the CPU, got meta"),
    ],
)
def test_an_observation_that_does_not_fit(
    robot: Robot, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """One row goes on afterwards."""
    policy = load(robot.bundle)
    (batch,) = batches(1, 1)
    with pytest.raises(error, match=message):
        policy.select_action({**batch, **change})
    policy.select_action(batch)


def test_options_are_flags(robot: Robot) -> None:
    flags = ["--backend=onnxruntime", "--seed=3", "--temperature=0.5", "--prefetch=off"]
    policy = load(robot.bundle, *flags, '--guards={"action_limits": [0, 1], "max_change": 5}')
    config = policy.config
    assert (config.backend, config.seed, config.temperature) == ("onnxruntime", 3, 0.5)
    assert (config.prefetch, config.replan_every) == ("off", None)
    assert config.guards == Guards(action_limits=(0, 1), max_change=5)
    action = policy.select_action(*batches(1, 1))
    assert 0 <= action.min() <= action.max() <= 1


def test_after_a_hand_over_the_first_action_is_near_the_arm(robot: Robot) -> None:
    """Whatever the policy would do by itself, and whatever it did before."""
    flags = "--start_from_state=true", '--guards={"max_change": 3, "action_limits": null}'
    policy, free = load(robot.bundle, *flags), load(robot.bundle)
    first, *others = batches(4, 2)
    # Where the operator leaves the arms.
    left = {**first, STATE: torch.tensor([[10.0, 500.0], [400.0, 20.0]])}
    assert (free.select_action(left) - left[STATE]).abs().max() > 10
    for batch in (first, *others):
        policy.select_action(batch)
    broken = {**left, STATE: torch.full((2, 2), torch.nan)}
    for _ in range(2):
        policy.reset()  # as LeRobot does where an operator hands back
        assert all(not each._queue for each in policy.rows)
        with pytest.raises(ObservationError, match="expected finite values"):
            policy.select_action(broken)
        policy.reset()
        before = left[STATE]
        for _ in range(3):
            action = policy.select_action(left)
            assert (action - before).abs().max() <= 3 + 1e-4
            before = action
    with pytest.raises(UsageError, match="max_change, which is not set"):
        load(robot.bundle, "--start_from_state=true")


def test_rows_are_recorded(robot: Robot, tmp_path: Path) -> None:
    """The newest, until the policy is let go."""
    folder, seen = tmp_path / "seen", batches(6, 2)
    policy = load(robot.bundle, f"--record={folder}", "--record_max_bytes=2000000")
    actions = [policy.select_action(batch).numpy() for batch in seen]
    del policy
    gc.collect()
    for number in range(2):
        (episode,) = Recording(folder / f"row_{number}").episodes
        np.testing.assert_array_equal(episode.actions, [action[number] for action in actions])
        assert set(episode.outcomes.tolist()) == {Outcome.ACTED}
    with pytest.raises(UsageError, match="holds a recording already"):
        load(robot.bundle, f"--record={folder}")


def test_the_loops_rate_beside_the_demonstrations(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    clock = 0.0
    monkeypatch.setattr(modeling_vqbet_edge.time, "monotonic", lambda: clock)
    said = []
    for period in (1 / 30, 1 / 60):
        pace = modeling_vqbet_edge._Pace(30.0)
        caplog.clear()
        for _ in range(3):  # episodes with pauses between
            clock += 10
            pace.begin()
            for _ in range(40):
                clock += period
                pace.tick()
        said.append([record.getMessage() for record in caplog.records])
    assert said[0] == []
    (text,) = said[1]
    assert "60 actions a second, the demonstrations have 30: a robot moves 2 times" in text


def test_a_bundle_that_computes_something_else_is_refused(
    robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven = []
    monkeypatch.setattr("vqbet_edge.runtime.proof.prove", lambda *given: proven.append(given))
    load(robot.bundle)
    assert not proven
    load(robot.bundle, "--prove=true")
    assert len(proven) == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--guards=5", r"expected JSON such as .*Expected `object`, got `int`"),
        ('--guards={"max_speed": 5}', r"with some of action_limits, .*\(max_speed\)"),
        ('--guards={"max_change": "fast"}', r"Expected `float \| array"),
        ('--guards={"deadline_s": 0.1}', "deadline_s and on_late belong together"),
        ("--backend=cuda", "unknown backend 'cuda'"),
        ("--replan_every=99", "expected replan_every in 1..5"),
        ("--device=cuda", "expected --policy.device=cpu, got cuda"),
        ("--use_amp=true", "--policy.use_amp has no effect"),
    ],
)
def test_options_out_of_range(robot: Robot, flag: str, message: str) -> None:
    # LeRobot's parser wraps what a field's decoder raises.
    with pytest.raises((UsageError, draccus.utils.DecodingError), match=message):
        load(robot.bundle, flag)


def test_a_bundle_is_not_trained(robot: Robot) -> None:
    policy = load(robot.bundle)
    assert not policy.training
    for call in (
        policy.train,
        policy.get_optim_params,
        policy.config.get_optimizer_preset,
        policy.config.get_scheduler_preset,
        lambda: policy.forward({}),
        lambda: VqbetEdgePolicy(VqbetEdgeConfig()),
    ):
        with pytest.raises(UsageError, match="cannot be trained"):
            call()
    with pytest.raises(UsageError, match="saved by copying its directory"):
        policy.save_pretrained("elsewhere")


def test_features_that_the_bundle_does_not_have(robot: Robot) -> None:
    """As when an environment's action has another width."""
    config = PreTrainedConfig.from_pretrained(robot.bundle)
    config.output_features["action"].shape = (6,)
    with pytest.raises(UsageError, match=r"'action': \(2,\)}, got .*'action': \(6,\)}"):
        VqbetEdgePolicy.from_pretrained(robot.bundle, config=config)


def test_a_checkpoint_is_no_bundle(robot: Robot) -> None:
    with pytest.raises(UsageError, match="checkpoint of type vqbet, expected a bundle"):
        VqbetEdgePolicy.from_pretrained(robot.checkpoint)


def test_files_that_are_missing_or_edited(robot: Robot, tmp_path: Path) -> None:
    bundle, name = shutil.copytree(robot.bundle, tmp_path / "copy"), "policy_preprocessor.json"
    config = PreTrainedConfig.from_pretrained(bundle)
    data = (bundle / name).read_bytes()
    (bundle / name).unlink()
    with pytest.raises(Exception, match=rf"{name}.*copy the whole bundle again"):
        load(bundle)
    (bundle / name).write_bytes(data.replace(b"n", b"m", 1))
    with pytest.raises(BundleError, match=f"'{name}' is not the file that was exported"):
        VqbetEdgePolicy.from_pretrained(bundle, config=config)


def test_the_files_are_those_that_the_plugin_would_write(robot: Robot, tmp_path: Path) -> None:
    """Whichever way LeRobot makes the processors, they are the same and normalise nothing."""
    config = PreTrainedConfig.from_pretrained(robot.bundle)
    assert isinstance(config, VqbetEdgeConfig)
    assert (config.license, config.n_obs_steps) == ("mit", PUSHT.fields.get("n_obs_steps", 5))
    for pipeline in make_vqbet_edge_pre_post_processors(config):
        pipeline.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["policy_postprocessor.json", "policy_preprocessor.json"]
    for name in names:
        written, found = ((place / name).read_text() for place in (tmp_path, robot.bundle))
        assert json.loads(found) == json.loads(written)
    before, after = make_pre_post_processors(config)
    (batch,) = batches(1, 2)
    seen = before(dict(batch))
    for key in (IMAGE, STATE):
        assert torch.equal(seen[key], batch[key])
    actions = torch.tensor([[300.0, -5.0]])
    assert torch.equal(after(actions), actions)


@pytest.mark.extended
def test_lerobot_discovers_the_distribution(installed: Path) -> None:
    (described,) = installed.glob("lerobot_policy_vqbet_edge-*.dist-info")
    metadata = Distribution.at(described).metadata
    assert metadata["Name"].startswith("lerobot_policy_")
    assert metadata.get_all("Requires-Dist") == ["lerobot>=0.4.4", "vqbet-edge[cpu]"]
