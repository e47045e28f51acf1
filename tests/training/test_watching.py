"""What a run shows while it goes on: lines, trackers, episodes, and which checkpoints stay."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from demonstrated import demonstrations
from sizes import losses, short_run
from workshop import once

from vqbet_edge.errors import UsageError
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.evaluation.trials import Outcome, Trials
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.phases import Phase
from vqbet_edge.training.trainer import train

OPTIONS: dict[str, Any] = {"steps": 12, "n_vqvae_training_steps": 2}
ENVIRONMENT = '''
import gymnasium
import numpy as np
from gymnasium import spaces


class Short(gymnasium.Env):
    """Three steps; solved where the first action is positive."""

    def __init__(self):
        box = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        state = spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = spaces.Dict(
            {"observation.images.front": box, "observation.state": state}
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.seen(), {}

    def seen(self):
        frame = self.np_random.integers(0, 256, (64, 64, 3), np.uint8)
        state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"observation.images.front": frame, "observation.state": state}

    def step(self, action):
        self.steps += 1
        np.random.normal()
        ended = self.steps == 3
        return self.seen(), float(action[0]), ended, False, {"is_success": bool(action[0] > 0)}


class Silent(Short):
    def step(self, action):
        return *super().step(action)[:4], {}


class Blind(Short):
    def __init__(self):
        super().__init__()
        del self.observation_space.spaces["observation.state"]


class Wide(Short):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (7,), np.float32)


class Asking(Short):
    def __init__(self, size):
        super().__init__()


class Nothing:
    pass
'''


@pytest.fixture(autouse=True)
def quick(
    monkeypatch: pytest.MonkeyPatch,
    cwd: Path,
    without_report: None,  # noqa: ARG001
) -> None:
    """An environment of somebody's own lies in the folder."""
    (cwd / "own_env.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(str(cwd))
    monkeypatch.delitem(__import__("sys").modules, "own_env", raising=False)


@pytest.fixture(scope="module")
def data(shared: Path) -> Path:
    return once(shared / "watched", lambda: demonstrations(shared / "watched"))


def killed(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    """Train, and end before the tenth step."""
    update = Phase.update

    def ending(phase: Phase, step: int, frames: Any) -> Any:
        if step == 9:
            raise RuntimeError("killed")
        return update(phase, step, frames)

    monkeypatch.setattr(Phase, "update", ending)
    with pytest.raises(RuntimeError, match="killed"):
        train(config)


def test_a_line_is_the_mean_of_its_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(short_run(data, tmp_path / "each", **OPTIONS))
    train(short_run(data, tmp_path / "some", log_every=5, **OPTIONS))
    each = {r["step"]: r for r in losses(tmp_path / "each") if r["kind"] == "phase 2"}
    some = {r["step"]: r for r in losses(tmp_path / "some") if r["kind"] == "phase 2"}
    assert list(some) == [5, 10, 12]
    for name in ("loss", "primary", "offset", "primary_accuracy"):
        mean = np.mean([each[step][name] for step in range(6, 11)])
        assert some[10][name] == pytest.approx(mean, rel=1e-5)
    speeds = [r for r in read_metrics(tmp_path / "some/metrics.jsonl") if r["kind"] == "speed"]
    assert [r["step"] for r in speeds] == [2, 5, 10, 12]
    assert all(r["samples_per_second"] > 0 and 0 < r["data_share"] < 1 for r in speeds)
    # Stopped within an interval.
    with monkeypatch.context() as patch:
        killed(patch, short_run(data, tmp_path / "halves", log_every=5, save_every=4, **OPTIONS))
    train(short_run(data, tmp_path / "halves", log_every=5, save_every=4, resume=True, **OPTIONS))
    assert losses(tmp_path / "halves") == losses(tmp_path / "some")


def test_all_that_is_kept_is_validated_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def validate(_: Phase, batches: Iterable[Any]) -> dict[str, float]:
        seen.extend(frame for batch in batches for frame in batch)
        return {}

    monkeypatch.setattr(Phase, "validate", validate)
    train(short_run(data, tmp_path / "run", batch_size=1, validate_every=100, **OPTIONS))
    opened = LeRobotDataset.open(data)
    (kept,) = opened.split(0.25, 0).validation
    assert sorted(seen) == sorted(2 * [*range(opened.bounds[kept], opened.bounds[kept + 1])])


class Tracker(tracking.GeneralTracker):
    """In the place of TensorBoard's, which need not be installed."""

    name = "tensorboard"
    requires_logging_directory = True
    begun: dict[str, Any]
    logged: list[tuple[int, dict[str, float]]]

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir

    def start(self) -> None:
        Tracker.logged = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        Tracker.begun = values

    def log(self, values: dict[str, float], step: int, **_: Any) -> None:
        Tracker.logged.append((step, values))


def test_a_tracker_gets_what_metrics_jsonl_gets(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_run(data, tmp_path / "run", log_with="tensorboard", **OPTIONS)
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(UsageError, match=r"--log-with tensorboard .*: pip install tensorboard"):
        train(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    train(config)
    told = []
    for record in read_metrics(tmp_path / "run/metrics.jsonl"):
        step, kind = record.pop("step"), record.pop("kind")
        told.append((step, {f"{kind}/{name}": value for name, value in record.items()}))
    assert Tracker.logged == told
    assert Tracker.begun["batch_size"] == config.batch_size
    assert {type(value) for value in Tracker.begun.values()} <= {str, int, float, bool}


def test_episodes_leave_the_run_as_it_is_and_are_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driving = {"eval_env": "own_env:Short", "eval_every": 4, "eval_episodes": 3, **OPTIONS}
    train(short_run(data, tmp_path / "plain", **OPTIONS))
    train(short_run(data, tmp_path / "driven", **driving))
    driven = losses(tmp_path / "driven")
    assert [r for r in driven if r["kind"] != "episodes"] == losses(tmp_path / "plain")
    episodes = [r for r in driven if r["kind"] == "episodes"]
    assert [r["step"] for r in episodes] == [4, 8, 12]
    assert all(r["episode_steps"] == 3 for r in episodes)
    best = max(episodes, key=lambda r: (r["success"], r["max_reward"], -r["step"]))
    link = tmp_path / "driven/checkpoints/best"
    assert link.resolve().name == f"{best['step']:06d}"
    with monkeypatch.context() as patch:
        killed(patch, short_run(data, tmp_path / "halves", **driving))
    (tmp_path / "halves/checkpoints/best").unlink()
    train(short_run(data, tmp_path / "halves", resume=True, **driving))
    assert losses(tmp_path / "halves") == driven
    assert (tmp_path / "halves/checkpoints/best").resolve().name == link.resolve().name


def test_the_best_and_the_newest_checkpoints_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([Outcome(0.5, 1, 3), Outcome(0.6, 1, 3), Outcome(0.6, 0.5, 3)])
    interrupted: list[Path] = []

    def drive(_: Trials, checkpoint: Path) -> Outcome:
        saved = json.loads((checkpoint / "config.json").read_text())
        assert saved["type"] == "vqbet"
        if not interrupted:
            interrupted.append(checkpoint)
            raise KeyboardInterrupt
        return next(outcomes)

    monkeypatch.setattr(Trials, "drive", drive)
    driving = {"eval_env": "own_env:Short", "eval_every": 4, "keep": 2, "save_every": 1, **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        train(short_run(data, tmp_path / "run", **driving))
    folder = tmp_path / "run/checkpoints"
    assert {path.name for path in folder.iterdir()} == {"000003", "000004", "last"}
    with pytest.raises(UsageError, match="--eval-episodes 20, now it is 3"):
        train(short_run(data, tmp_path / "run", resume=True, eval_episodes=3, **driving))
    # What was interrupted is made up for.
    train(short_run(data, tmp_path / "run", resume=True, **driving))
    records = [r for r in losses(tmp_path / "run") if r["kind"] == "episodes"]
    assert [(r["step"], r["success"]) for r in records] == [(4, 0.5), (8, 0.6), (12, 0.6)]
    names = {path.name for path in folder.iterdir()}
    assert names == {"000008", "000011", "000012", "last", "best"}
    assert (folder / "best").resolve().name == "000008"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_env:Blind", "it shows observation.images.front, and no 'observation.state'"),
        ("own_env:Asking", "cannot be made without arguments: .*size"),
        ("own_env:Nothing", "it is Nothing, expected a gymnasium.Env"),
        ("own_env:Missing", "has no attribute 'Missing'; expected module:Class"),
        ("no_such_module:Short", "cannot be imported: No module named 'no_such_module'"),
        ("own_env:Wide", r"the policy's actions are \(2,\), and own_env:Wide takes \(7,\)"),
        ("detour", "the policy observes 'observation.images.front' of shape .* detour shows none"),
        ("own_env:Silent", r"return info\['is_success'\], and returned nothing"),
    ],
)
def test_an_environment_that_does_not_fit_is_a_sentence(
    data: Path, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(short_run(data, tmp_path / "run", eval_env=name, eval_every=4, **OPTIONS))
    assert (tmp_path / "run").exists() == (name == "own_env:Silent")  # known by its episodes
