"""Checkpoints of a run, and going on from the last one.

checkpoints/<step>/pretrained_model/    what robots and LeRobot load, see `pretrained`
checkpoints/<step>/training_state/      progress, optimiser, unaveraged weights; no pickle
checkpoints/last                        link to the newest
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vqbet_edge.errors import CheckpointError, UsageError
from vqbet_edge.training.config import TrainConfig, flag
from vqbet_edge.training.files import new_directory, point_to, sweep, write_bytes
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.pretrained import save_pretrained

# What may differ between a run and its continuation, because no loss depends on it.
_FREE_FIELDS = {
    "dataset", "output", "resume", "log_every", "validate_every", "save_every", "frame_cache",
}  # fmt: skip
# What reading half a checkpoint ends in.
_BROKEN = OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError
# Phase 1 has converged when so many looks did not win this share of its error.
_PATIENCE, _WORTH_WHILE = 3, 0.01


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps of both phases that are done.
        error: phase 1's best reconstruction error so far, normalised.
        stale: how many looks ago that was.
    """

    step: int = 0
    error: float = math.inf
    stale: int = 0

    def seen(self, error: float) -> "Progress":
        """After a look at phase 1's reconstruction error."""
        if error < self.error * (1 - _WORTH_WHILE):
            return replace(self, error=error, stale=0)
        return replace(self, stale=self.stale + 1)

    @property
    def converged(self) -> bool:
        """Whether phase 1 has stopped learning."""
        return self.stale >= _PATIENCE


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint's training state holds."""

    progress: Progress
    weights: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    optimizer: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, config: TrainConfig, scalings: Scalings) -> None:
        self._config, self._scalings = config, scalings
        self._directory = config.output / "checkpoints"

    @property
    def last(self) -> Path:
        """Link to the newest checkpoint."""
        return self._directory / "last"

    def save(
        self,
        progress: Progress,
        network: VQBeT,
        averaged: VQBeT | None,
        optimizer: dict[str, Any],
    ) -> None:
        """Write a checkpoint; the one before it stays whole whatever happens.

        Args:
            progress: how far the run has come.
            network: the weights that training goes on with.
            averaged: their moving average, which robots get when there is one.
            optimizer: its state.

        Raises:
            DiskError: it cannot be written.
        """
        path = self._directory / f"{progress.step:06d}"
        with new_directory(path) as temporary:
            (temporary / "pretrained_model").mkdir()
            state = temporary / "training_state"
            state.mkdir()
            final = averaged or network
            save_pretrained(temporary / "pretrained_model", final, self._config, self._scalings)
            write_bytes(state / "training_step.json", json.dumps(asdict(progress)).encode())
            _write_optimizer(state / "optimizer.safetensors", optimizer)
            if averaged is not None:
                weights = safetensors.torch.save(network.state_dict())
                write_bytes(state / "model.safetensors", weights)
        point_to(self.last, path)

    def start(self) -> Resumed | None:
        """What to go on from: None for a new run.

        Raises:
            UsageError: a run is there and `resume` was not asked for, or the other way round, or
                the configuration is another.
            CheckpointError: the checkpoint is not whole.
        """
        if not self._config.resume:
            if self.last.exists():
                raise UsageError(
                    f"{self._config.output} holds a run already; "
                    "pass --resume to go on with it, or another --output"
                )
            return None
        if not self.last.exists():
            if self._config.output.exists():
                return None
            raise UsageError(f"there is no run in {self._config.output} to resume; drop --resume")
        sweep(self._directory)
        try:
            self._check_same()
            return self._load(self.last)
        except _BROKEN as e:
            raise CheckpointError(
                f"{self.last.resolve()} is not whole ({e}); point the link {self.last} to an "
                "earlier checkpoint"
            ) from e

    def _load(self, path: Path) -> Resumed:
        state = path / "training_state"
        final = safetensors.torch.load_file(path / "pretrained_model" / "model.safetensors")
        own = state / "model.safetensors"
        return Resumed(
            progress=Progress(**json.loads((state / "training_step.json").read_text())),
            weights=safetensors.torch.load_file(own) if own.exists() else final,
            averaged=final if own.exists() else None,
            optimizer=_read_optimizer(state / "optimizer.safetensors"),
        )

    def _check_same(self) -> None:
        before = json.loads((self.last / "pretrained_model" / "train_config.json").read_text())
        now = self._config.to_json()
        for name in now.keys() - _FREE_FIELDS:
            if name in before and before[name] != now[name]:
                raise UsageError(
                    f"the run was started with {flag(name)} {before[name]}, now it is {now[name]}; "
                    "pass the same, or start a new run in another --output"
                )


def _write_optimizer(path: Path, state: dict[str, Any]) -> None:
    """Write `Optimizer.state_dict()` as tensors `<parameter>.<name>`, the settings as metadata."""
    tensors = {
        f"{parameter}.{name}": torch.as_tensor(value).contiguous()
        for parameter, entry in state["state"].items()
        for name, value in entry.items()
    }
    settings = {"param_groups": json.dumps(state["param_groups"])}
    write_bytes(path, safetensors.torch.save(tensors, settings))


def _read_optimizer(path: Path) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    with safetensors.safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            parameter, _, name = key.partition(".")
            state.setdefault(int(parameter), {})[name] = file.get_tensor(key)
        return {"state": state, "param_groups": json.loads(file.metadata()["param_groups"])}
