"""Which checkpoint a run goes on from, whatever copying made of its folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from sizes import short_run
from workshop import once

from vqbet_edge.errors import CheckpointError, UsageError, VQBeTEdgeError
from vqbet_edge.training import trainer
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.checkpoints import Checkpoints, DataFacts, Progress
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.metrics import read_metrics
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.phases import Phase
from vqbet_edge.training.trainer import train


def checkpoints(run: TrainConfig) -> Checkpoints:
    dataset = LeRobotDataset.open(run.dataset)
    policy = run.policy(dataset)
    return Checkpoints(run, Scalings.of(dataset, policy), DataFacts.of(dataset, policy))


@pytest.fixture(scope="module")
def saved(pusht: Path, shared: Path) -> Path:
    """A run that has saved after 4, 8 and 12 steps, without having trained."""
    output = shared / "saved"

    def save() -> None:
        run = short_run(pusht, output)
        torch.manual_seed(0)
        network = VQBeT(run.policy(LeRobotDataset.open(pusht)))
        vqvae = network.head.vqvae_model
        vqvae.discretized.fill_(True)
        optimizer = torch.optim.Adam(network.parameters()).state_dict()
        for step in (4, 8, 12):
            with torch.no_grad():
                next(network.parameters()).fill_(step)
            checkpoints(run).save(Progress(step), network, None, optimizer)

    return once(output, save)


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target, symlinks=True))


def missing(last: Path) -> None:
    last.unlink()


def dangling(last: Path) -> None:
    last.unlink()
    last.symlink_to("/nowhere/checkpoints/000012")


def a_text(last: Path) -> None:
    """As an archive without links, or Git without them, writes it."""
    last.unlink()
    last.write_text("000012")


def a_folder(last: Path) -> None:
    """As `cp -rL` and downloads make it."""
    newest = last.resolve()
    last.unlink()
    shutil.copytree(newest, last)


def only_a_folder(last: Path) -> None:
    newest = last.resolve()
    last.unlink()
    for path in list(last.parent.iterdir()):
        path.rename(last) if path == newest else shutil.rmtree(path)


def an_old_folder(last: Path) -> None:
    last.unlink()
    shutil.copytree(last.parent / "000008", last)


COPIES = [missing, dangling, a_text, a_folder, only_a_folder, an_old_folder]


@pytest.mark.parametrize("change", COPIES, ids=lambda change: change.__name__)
def test_the_numbered_folders_are_the_run(
    saved: Path, tmp_path: Path, pusht: Path, change: Callable[[Path], None]
) -> None:
    run = copy(saved, tmp_path / "run")
    last = run / "checkpoints" / "last"
    change(last)
    if change is not an_old_folder:  # which is there, so it is what was asked for
        weights = load_checkpoint(str(last / "pretrained_model")).network.state_dict()
        assert next(iter(weights.values())).unique().item() == 12
        with pytest.raises(CheckpointError, match=r"holds no model\.safetensors; pass '"):
            load_checkpoint(str(run))
    with pytest.raises(UsageError, match="holds a run already"):
        checkpoints(short_run(pusht, run, seed=3)).start()
    resumed = checkpoints(short_run(pusht, run, resume=True)).start()
    assert resumed is not None
    assert (resumed.progress.step, resumed.path.name) == (12, "000012")
    assert last.is_symlink()
    assert last.resolve() == resumed.path


def test_another_configuration_does_not_resume(saved: Path, tmp_path: Path, pusht: Path) -> None:
    with pytest.raises(UsageError, match=r"--dropout 0.1, now it is 0.2"):
        checkpoints(short_run(pusht, saved, resume=True, dropout=0.2)).start()
    with pytest.raises(UsageError, match="no run in"):
        checkpoints(short_run(pusht, tmp_path / "other", resume=True)).start()


def test_a_disk_without_links_gets_none(
    saved: Path, tmp_path: Path, pusht: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    run = copy(saved, tmp_path / "run")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    an_old_folder(run / "checkpoints/last")
    assert checkpoints(short_run(pusht, run, resume=True)).start() is not None
    assert not (run / "checkpoints/last").exists()
    assert checkpoints(short_run(pusht, run)).last.name == "000012"


def half_copied(run: Path) -> None:
    path = run / "checkpoints/000012/training_state/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def no_folders(run: Path) -> None:
    for path in (run / "checkpoints").glob("0*"):
        shutil.rmtree(path)


def half_of_last(run: Path) -> None:
    a_folder(run / "checkpoints/last")
    (run / "checkpoints/last/training_state/training_step.json").write_text("")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (half_copied, "000012 is not whole .*; copy it again, or delete it"),
        (no_folders, "last is there, but no checkpoint"),
        (half_of_last, "last is no whole checkpoint .*; delete it"),
    ],
)
def test_what_is_not_whole_is_named(
    saved: Path, tmp_path: Path, pusht: Path, damage: Callable[[Path], None], message: str
) -> None:
    run = copy(saved, tmp_path / "run")
    damage(run)
    with pytest.raises(CheckpointError, match=message):
        checkpoints(short_run(pusht, run, resume=True)).start()


def test_what_a_killed_writer_left_is_no_checkpoint(
    saved: Path, tmp_path: Path, pusht: Path
) -> None:
    run = copy(saved, tmp_path / "run")
    (run / "checkpoints/000012").rename(run / "checkpoints/.000012.tmp")
    resumed = checkpoints(short_run(pusht, run, resume=True)).start()
    assert resumed is not None
    assert resumed.path.name == "000008"
    assert not (run / "checkpoints/.000012.tmp").exists()


def test_another_data_set_does_not_resume(saved: Path, tmp_path: Path, pusht: Path) -> None:
    """Its statistics would scale a policy anew whose codebooks are frozen."""
    run = copy(saved, tmp_path / "run")
    moved = Path(shutil.copytree(pusht, tmp_path / "moved"))
    assert checkpoints(short_run(moved, run, resume=True)).start() is not None
    now = checkpoints(short_run(pusht, run, resume=True))
    stats = {**now._scalings.stats, "observation.image": now._scalings.stats["action"]}
    now._scalings = replace(now._scalings, stats=stats)
    with pytest.raises(UsageError, match=r"observation.image.\w+ was not there, now it is"):
        now.start()
    for path in (*moved.glob("data/*/*.parquet"), *moved.glob("meta/episodes/*/*.parquet")):
        table = pq.read_table(path)
        pq.write_table(table.filter(pc.field("episode_index") == 0), path)
    with pytest.raises(UsageError, match=r"action.\w+ was \[.*\], now it is \[.*\], and the"):
        checkpoints(short_run(moved, run, resume=True)).start()


def test_other_demonstrations_with_the_same_statistics_do_not_resume(
    saved: Path, tmp_path: Path, pusht: Path
) -> None:
    run = copy(saved, tmp_path / "run")
    swapped = Path(shutil.copytree(pusht, tmp_path / "swapped"))
    (path,) = swapped.glob("data/*/*.parquet")
    table = pq.read_table(path)
    states = table["observation.state"].to_pylist()
    states[3], states[4] = states[4], states[3]
    place = table.column_names.index("observation.state")
    column = pa.chunked_array([pa.array(states, table["observation.state"].type)])
    pq.write_table(table.set_column(place, "observation.state", column), path)
    with pytest.raises(UsageError, match=r"swapped is not what .*: sha256 was .*--pretrained"):
        checkpoints(short_run(swapped, run, resume=True)).start()
    config = run / "checkpoints/000012/pretrained_model/train_config.json"
    older = json.loads(config.read_text())
    assert older.pop("fingerprint")["episodes"] == 4
    config.write_text(json.dumps(older))
    assert checkpoints(short_run(swapped, run, resume=True)).start() is not None


def test_the_data_sets_rate_is_in_the_checkpoint(saved: Path, pusht: Path, tmp_path: Path) -> None:
    path = "checkpoints/000012/pretrained_model/train_config.json"
    assert json.loads((saved / path).read_text())["fps"] == 10
    run = copy(saved, tmp_path / "run")  # as it was written before there was a rate in it
    older = json.loads((run / path).read_text())
    del older["fps"]
    (run / path).write_text(json.dumps(older))
    assert checkpoints(short_run(pusht, run, resume=True)).start() is not None


def test_a_finished_run_can_be_made_longer_and_says_so(
    pusht: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "write_report", lambda *_: None)
    monkeypatch.setattr(trainer, "text", lambda _: "")
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)
    run = tmp_path / "run"
    options = {"n_vqvae_training_steps": 2, "scheduler_warmup_steps": 1}
    train(short_run(pusht, run, steps=4, **options))
    assert "positions near the state (at 1" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UsageError, match="--steps 4, now it is 3"):
        train(short_run(pusht, run, steps=3, resume=True, **options))
    capfd.readouterr()
    path = train(short_run(pusht, run, steps=6, resume=True, **options))
    said = " ".join(capfd.readouterr().err.split())
    assert "going on from step 4" in said
    assert "was to have 4 steps and now has 6" in said
    assert path.resolve().parent.name == "000006"
    rates = {r["step"]: r["lr"] for r in read_metrics(run / "metrics.jsonl") if "lr" in r}
    assert list(rates) == [1, 2, 3, 4, 5, 6]
    # Warm-up, then a cosine over the steps behind it: of 4 at first, then of 6.
    assert [rates[step] / 1e-4 for step in (4, 5, 6)] == pytest.approx([1, 0.5, 0], abs=1e-9)


def test_weights_that_are_not_finite_are_not_saved(
    pusht: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Phase.update

    def diverging(phase: Phase, done: int, frames: Any) -> Any:
        losses = update(phase, done, frames)
        if done == 3:
            parameter = phase.optimizer.param_groups[0]["params"][0]
            torch.nn.init.constant_(parameter, float("nan"))
        return losses

    monkeypatch.setattr(Phase, "update", diverging)
    options = {"n_vqvae_training_steps": 3, "steps": 6, "log_every": 100}
    with pytest.raises(VQBeTEdgeError, match="not finite at step 4, and are not saved"):
        train(short_run(pusht, tmp_path / "run", save_every=4, **options))
    assert not (tmp_path / "run/checkpoints/000004").exists()
