"""Checkpoints of a run, and going on from the last one.

checkpoints/<step>/pretrained_model/    what robots and LeRobot load, see `layouts`
checkpoints/<step>/training_state/      progress, optimiser, unaveraged weights; no pickle
checkpoints/last                        link to the newest, for people
checkpoints/best                        link to the one that did best in --eval-env

The numbered folders are the run. Copying often loses the link, or makes a folder of it.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from vqbet_edge.errors import CheckpointError, UsageError
from vqbet_edge.training.config import ACTION_KEY, STATE_KEY, TrainConfig, VQBeTConfig, flag
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.files import (
    new_directory,
    numbered,
    point_to,
    remove,
    replace_bytes,
    sweep,
    through_last,
    write_bytes,
    writing,
)
from vqbet_edge.training.layouts import (
    STATISTICS_NAME,
    TRAIN_CONFIG_NAME,
    WEIGHTS_NAME,
    save_pretrained,
    statistics,
)
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Floats, Scalings

# What may differ between a run and its continuation, because no loss depends on it, or checked by
# other means: what matters of the data set is its statistics, and `steps` may grow.
_FREE_FIELDS = {
    "dataset", "more_datasets", "revision", "output", "steps", "resume", "log_every",
    "validate_every", "save_every", "frame_cache", "stream_frames", "num_workers", "keep",
    "log_with", "eval_env", "eval_every", "eval_episodes",
}  # fmt: skip
# What reading half a checkpoint ends in.
_BROKEN = OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError
_PROGRESS = "training_state/training_step.json"
# Phase 1 has converged when so many looks did not win this share of its error.
_PATIENCE, _WORTH_WHILE = 3, 0.01


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # of both phases
    error: float = math.inf  # phase 1's best reconstruction error so far, normalised
    stale: int = 0  # how many looks ago that was
    # Losses since the last line of the metrics, summed over so many steps.
    sums: Sequence[float] = ()
    summed: int = 0
    # At which step episodes were driven last; the best step, and how it did.
    driven: int = 0
    best: int = 0
    success: float = -1.0
    max_reward: float = -math.inf

    def seen(self, error: float) -> "Progress":
        """After a look at phase 1's reconstruction error."""
        if error < self.error * (1 - _WORTH_WHILE):
            return replace(self, error=error, stale=0)
        return replace(self, stale=self.stale + 1)

    def drove(self, success: float, max_reward: float) -> "Progress":
        """After episodes at this step."""
        driven = replace(self, driven=self.step)
        if (success, max_reward) <= (self.success, self.max_reward):
            return driven
        return replace(driven, best=self.step, success=success, max_reward=max_reward)

    @property
    def converged(self) -> bool:
        """Whether phase 1 has stopped learning."""
        return self.stale >= _PATIENCE


@dataclass(frozen=True)
class DataFacts:
    """What a run keeps of its data set, to know it again wherever it then lies."""

    fps: float
    fingerprint: dict[str, int | str]  # by what people would call it

    @classmethod
    def of(cls, dataset: LeRobotDataset, policy: VQBeTConfig) -> "DataFacts":
        """Of what a policy sees of a data set; videos are not read."""
        features = {**policy.input_features, **policy.output_features}
        shapes = {key: feature.shape for key, feature in features.items()}
        lengths = np.diff(dataset.bounds).tolist()
        numbers = [episode.index for episode in dataset.info.episodes]
        digest = hashlib.sha256(repr((dataset.fps, shapes, numbers, lengths)).encode())
        for key in (STATE_KEY, ACTION_KEY):
            digest.update(np.ascontiguousarray(dataset.column(key)).data)
        counts = {"episodes": len(lengths), "frames": dataset.num_frames}
        return cls(dataset.fps, {**counts, "sha256": digest.hexdigest()})


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint's training state holds."""

    path: Path
    steps: int  # that the run was to have
    progress: Progress
    weights: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    optimizer: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, config: TrainConfig, scalings: Scalings, data: DataFacts) -> None:
        self._config, self._scalings, self._data = config, scalings, data
        self._directory = config.output / "checkpoints"
        self._link, self._best = self._directory / "last", self._directory / "best"

    @property
    def last(self) -> Path:
        """The newest checkpoint: the link to it where there is one."""
        return through_last(self._link)

    def save(
        self,
        progress: Progress,
        network: VQBeT,
        averaged: VQBeT | None,
        optimizer: dict[str, Any],
    ) -> None:
        """Write a checkpoint; the one before it stays whole whatever happens.

        Training goes on with the weights of `network`; robots get `averaged` when there is one.

        Raises:
            DiskError: it cannot be written.
        """
        path = self._directory / f"{progress.step:06d}"
        with new_directory(path) as temporary:
            folder, state = temporary / "pretrained_model", temporary / "training_state"
            folder.mkdir()
            state.mkdir()
            final = averaged or network
            save_pretrained(folder, final, self._config, self._scalings, asdict(self._data))
            write_bytes(temporary / _PROGRESS, json.dumps(asdict(progress)).encode())
            write_bytes(state / "optimizer.safetensors", _encode_optimizer(optimizer))
            if averaged is not None:
                weights = safetensors.torch.save(network.state_dict())
                write_bytes(state / WEIGHTS_NAME, weights)
        point_to(self._link, path)
        self._point_to_best(progress)
        if self._config.keep is not None:
            for old in numbered(self._directory)[: -self._config.keep]:
                if int(old.name) != progress.best:
                    remove(old)

    def judged(self, progress: Progress) -> None:
        """Episodes were driven with the newest checkpoint."""
        path = self._directory / f"{progress.step:06d}" / _PROGRESS
        replace_bytes(path, json.dumps(asdict(progress)).encode())
        self._point_to_best(progress)

    def _point_to_best(self, progress: Progress) -> None:
        path = self._directory / f"{progress.best:06d}"
        if path.is_dir() and self._best.resolve() != path.resolve():
            point_to(self._best, path)

    def start(self) -> Resumed | None:
        """What to go on from: None for a new run.

        Raises:
            UsageError: a run is there and `resume` was not asked for, or the other way round, or
                the configuration is another.
            CheckpointError: the checkpoint is not whole.
        """
        output, known = self._config.output, os.path.lexists(self._link)
        if not self._config.resume:
            if known or numbered(self._directory):
                raise UsageError(
                    f"{output} holds a run already; "
                    "pass --resume to go on with it, or another --output"
                )
            return None
        sweep(self._directory)
        self._adopt()
        if found := numbered(self._directory):
            path = found[-1]
            try:
                self._check_same(path)
                resumed = _read(path)
            except _BROKEN as e:
                raise CheckpointError(
                    f"{path} is not whole ({e}); copy it again, or delete it to go on from the "
                    "checkpoint before it"
                ) from e
            if self._link.resolve() != path.resolve():
                point_to(self._link, path)
            self._point_to_best(resumed.progress)
            return resumed
        if known:
            raise CheckpointError(
                f"{self._link} is there, but no checkpoint (a folder such as 005000) in "
                f"{self._directory}; copy the run again, or start a new one in another --output"
            )
        if not output.exists():
            raise UsageError(f"there is no run in {output} to resume; drop --resume")
        return None

    def _adopt(self) -> None:
        """Give a folder `last`, a copy that was made through the link, its own name."""
        if not self._link.is_dir() or self._link.is_symlink():
            return
        try:
            step = int(json.loads((self._link / _PROGRESS).read_text())["step"])
        except _BROKEN as e:
            raise CheckpointError(
                f"{self._link} is no whole checkpoint ({e}); delete it, the numbered folders "
                "beside it are the run"
            ) from e
        own = self._directory / f"{step:06d}"
        with writing(own):
            if not own.exists():
                self._link.rename(own)

    def _check_same(self, path: Path) -> None:
        before = _config(path)
        now = self._config.to_json()
        # What a policy began with decides about others: it is said first.
        names = sorted(now.keys() - _FREE_FIELDS, key=lambda k: (not k.startswith("pretrained"), k))
        changed = [k for k in names if k in before and before[k] != now[k]]
        if now["steps"] < before["steps"]:
            changed.append("steps")
        if now["eval_env"] and before.get("eval_env"):  # what is best is best of the same
            episodes = "eval_env", "eval_episodes"
            changed += [name for name in episodes if before[name] != now[name]]
        for name in changed:
            raise UsageError(
                f"the run was started with {flag(name)} {before[name]}, now it is {now[name]}; "
                "pass the same, or start a new run in another --output"
            )
        # Codebooks and weights mean what the statistics that they were trained with say.
        stored = safetensors.numpy.load_file(path / "pretrained_model" / STATISTICS_NAME)
        found = statistics(self._scalings)
        seen = {name.rpartition(".")[0] for name in stored}
        new = [name for name in found if name.rpartition(".")[0] not in seen]
        for name in [*stored, *new]:
            then, here = stored.get(name), found.get(name)
            if then is None or here is None or not _same(then, here):
                raise UsageError(
                    f"{self._config.dataset} is not what the run in {self._config.output} was "
                    f"started with: {name} was {_text(then)}, now it is {_text(here)}, and the "
                    "policy would mean something else; pass the data set as it was, or start a new "
                    "run in another --output"
                )
        known = before.get("fingerprint", self._data.fingerprint)  # older runs have none
        for name, value in self._data.fingerprint.items():
            if known.get(name) != value:
                raise UsageError(
                    f"{self._config.dataset} is not what the run in {self._config.output} was "
                    f"started with: {name} was {known.get(name)}, now it is {value}; pass the data "
                    "set as it was, or train on with what is new in another --output, with "
                    f"--pretrained {path / 'pretrained_model'}"
                )


def _read(path: Path) -> Resumed:
    state = path / "training_state"
    final = safetensors.torch.load_file(path / "pretrained_model" / WEIGHTS_NAME)
    own = state / WEIGHTS_NAME
    return Resumed(
        path=path,
        steps=_config(path)["steps"],
        progress=Progress(**json.loads((path / _PROGRESS).read_text())),
        weights=safetensors.torch.load_file(own) if own.exists() else final,
        averaged=final if own.exists() else None,
        optimizer=_read_optimizer(state / "optimizer.safetensors"),
    )


def _config(path: Path) -> dict[str, Any]:
    text = (path / "pretrained_model" / TRAIN_CONFIG_NAME).read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def _same(a: Floats, b: Floats) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-6)


def _text(values: Floats | None) -> str:
    return "not there" if values is None else np.array2string(values.reshape(-1), precision=4)


def _encode_optimizer(state: dict[str, Any]) -> bytes:
    """`Optimizer.state_dict()` as tensors `<parameter>.<name>`, the settings as metadata."""
    tensors = {
        f"{parameter}.{name}": torch.as_tensor(value).contiguous()
        for parameter, entry in state["state"].items()
        for name, value in entry.items()
    }
    return safetensors.torch.save(tensors, {"param_groups": json.dumps(state["param_groups"])})


def _read_optimizer(path: Path) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    with safetensors.safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            parameter, _, name = key.partition(".")
            state.setdefault(int(parameter), {})[name] = file.get_tensor(key)
        return {"state": state, "param_groups": json.loads(file.metadata()["param_groups"])}
