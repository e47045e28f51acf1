"""A bundle as a LeRobot policy."""

import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from numpy.typing import NDArray
from torch import Tensor

from lerobot_policy_vqbet_edge.configuration_vqbet_edge import NO_TRAINING, VqbetEdgeConfig
from vqbet_edge import EdgePolicy
from vqbet_edge.errors import HistoryError, ObservationError, UsageError, VQBeTEdgeError
from vqbet_edge.runtime.manifest import FeatureSpec, Manifest

_LOG = logging.getLogger(__name__)
_Row = dict[str, NDArray[Any]]
# Calls after which the loop's rate is known, and what it may differ by.
_PACED, _RATES_DIFFER = 30, 0.1


class VqbetEdgePolicy(PreTrainedPolicy):
    """A bundle behind LeRobot's policy interface.

    Every row of a batch is a robot of its own: an `EdgePolicy` with a window, a queue and a random
    sequence, on weights that all rows share. Observations come in the robot's units and actions go
    out in them; the bundle normalises.
    """

    config_class = VqbetEdgeConfig
    name = "vqbet_edge"

    def __init__(self, config: VqbetEdgeConfig, policy: EdgePolicy | None = None, **_: Any) -> None:
        """Use `from_pretrained`.

        Raises:
            UsageError: there is no bundle, or the configuration has other features than it.
        """
        super().__init__(config)
        if policy is None:
            raise UsageError(f"pass a bundle with --policy.path=NAME.bundle; {NO_TRAINING}")
        _check_features(config, policy.manifest)
        if config.start_from_state and policy.manifest.state_dim != policy.manifest.action_dim:
            raise UsageError(
                f"--policy.start_from_state: the state has {policy.manifest.state_dim} values and "
                f"the action {policy.manifest.action_dim}, expected the same joints"
            )
        # One per row; those of rows that are not there now wait for a larger batch.
        self._rows = [policy]
        self._batch_size: int | None = None
        self._broken = False
        self._begins = True
        self._pace = _Pace(policy.fps)
        # LeRobot does not say when it is done with a policy.
        self._recordings = ExitStack()
        weakref.finalize(self, _close, self._recordings)
        self._record(0)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        **_: Any,
    ) -> "VqbetEdgePolicy":
        """Load a bundle: a directory, or a repository on the Hub.

        Args:
            pretrained_name_or_path: the directory or the repository's id.
            config: LeRobot's; None reads it from the bundle.
            revision: of the repository: a branch, tag or commit.

        Raises:
            BundleError, BackendError, UsageError: as `EdgePolicy.load` does.
        """
        source = str(pretrained_name_or_path)
        if config is None:
            config = PreTrainedConfig.from_pretrained(source, revision=revision)
        if not isinstance(config, VqbetEdgeConfig):
            raise UsageError(
                f"'{source}' is a checkpoint of type {config.type}, expected a bundle; make one "
                f"with: vqbet-export {source}"
            )
        if config.pretrained_path != Path(source):
            config.pretrained_revision = revision
            config.pretrained_path = Path(source)
        policy = EdgePolicy.load(
            config.pretrained_path,
            config.backend,  # type: ignore[arg-type] # checked there
            seed=config.seed,
            temperature=config.temperature,
            replan_every=config.replan_every,
            prefetch=config.prefetch,  # type: ignore[arg-type] # checked there
            guards=config.guards,
            prove=config.prove,
        )
        if (fps := policy.fps) is not None:  # LeRobot does not tell how fast its loop is
            how = "the demonstrations have %g observations a second: drive as fast, with --fps=%g"
            _LOG.warning(how, fps, fps)
        return cls(config, policy)

    @property
    def rows(self) -> tuple[EdgePolicy, ...]:
        """The policies of the batch's rows, for what LeRobot does not ask: `rows[0].last`."""
        return tuple(self._rows[: self._batch_size or 1])

    def reset(self) -> None:
        """Forget every row's history and queue; the next batch may have another size."""
        for policy in self._rows:
            policy.reset()
        self._batch_size, self._broken, self._begins = None, False, True
        self._pace.begin()

    def drop_queued_actions(self) -> None:
        """Forget every row's queue but not its history, as LeRobot asks where the task changes."""
        for policy in self._rows:
            policy.drop_queue()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The next action of every row; its observation enters the row's history.

        Args:
            batch: images float32 (B, 3, H, W) in [0, 1] and state float32 (B, S), on the CPU.

        Returns:
            float32 (B, action_dim), in the robot's units.

        Raises:
            ObservationError: an observation does not fit; where there is one row, the history is
                as before the call.
            UsageError: the batch has another size than since `reset`, or is not on the CPU.
            HistoryError: an earlier call failed after some rows had acted.
        """
        self._pace.tick()
        return self._each(batch, EdgePolicy.act)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """A chunk for every row, predicted at once; queued actions are dropped.

        Returns:
            float32 (B, action_chunk_size, action_dim), in the robot's units.
        """
        return self._each(batch, EdgePolicy.act_chunk)

    def forward(self, batch: dict[str, Tensor]) -> NoReturn:  # noqa: ARG002
        """Raises UsageError: a bundle cannot be trained."""
        raise UsageError(NO_TRAINING)

    def get_optim_params(self) -> NoReturn:
        """Raises UsageError: a bundle cannot be trained."""
        raise UsageError(NO_TRAINING)

    def train(self, mode: bool = True) -> "VqbetEdgePolicy":
        """Raises UsageError unless `mode` is False."""
        if mode:
            raise UsageError(NO_TRAINING)
        super().train(mode=False)
        return self

    def _save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            "a bundle is saved by copying its directory; to share it: "
            "vqbet-export CHECKPOINT --push-to-hub USER/NAME"
        )

    def _each(
        self, batch: dict[str, Tensor], act: Callable[[EdgePolicy, _Row], NDArray[np.float32]]
    ) -> Tensor:
        if self._broken:
            raise HistoryError(
                "an earlier call failed after some rows of the batch had acted; call reset()"
            )
        rows = _rows(batch, self._rows[0].manifest)
        self._set_batch_size(len(rows))
        if self._begins and self.config.start_from_state:
            self._anchor(rows)
        # Of one row, the runtime itself knows whether its history still holds.
        self._broken = len(rows) > 1
        actions = [act(policy, row) for policy, row in zip(self._rows, rows, strict=False)]
        self._broken = self._begins = False
        return torch.from_numpy(np.stack(actions))

    def _set_batch_size(self, size: int) -> None:
        if self._batch_size not in {None, size}:
            raise UsageError(
                f"expected a batch of {self._batch_size}, as since reset(), got {size}; call "
                "reset() before the number of robots changes"
            )
        self._batch_size = size
        for row in range(len(self._rows), size):
            self._rows.append(self._rows[0].sibling(seed=self.config.seed + row))
            self._record(row)

    def _anchor(self, rows: Sequence[_Row]) -> None:
        """Begin where each robot stands; what is no state is refused by `act`."""
        for policy, row in zip(self._rows, rows, strict=False):
            state = row[policy.manifest.state_key]
            if np.isfinite(state).all():
                policy.reset(from_action=state)

    def _record(self, row: int) -> None:
        """Record a row, if asked to, until LeRobot lets go of the policy.

        Raises:
            UsageError, DiskError: as `EdgePolicy.record` does.
        """
        if self.config.record is not None:
            folder, most = Path(self.config.record) / f"row_{row}", self.config.record_max_bytes
            recording = self._rows[row].record(folder, decisions=True, max_bytes=most, keep="last")
            self._recordings.enter_context(recording)


class _Pace:
    """How often LeRobot asks, beside how often the demonstrations were observed; said once."""

    def __init__(self, fps: float | None) -> None:
        self._fps = fps
        self.begin()

    def begin(self) -> None:
        """A pause does not count."""
        self._calls, self._first = 0, 0.0

    def tick(self) -> None:
        """An action is asked for."""
        if self._fps is None or self._calls > _PACED:
            return
        now = time.monotonic()
        if self._calls == 0:
            self._first = now
        elif self._calls == _PACED:
            rate = _PACED / max(now - self._first, 1e-9)
            if abs(rate / self._fps - 1) > _RATES_DIFFER:
                _LOG.warning(
                    "the loop takes %.3g actions a second, the demonstrations have %g: a robot "
                    "moves %.2g times as fast as in them (a simulator does not wait)",
                    rate, self._fps, rate / self._fps,
                )  # fmt: skip
                self._fps = None
        self._calls += 1


def _close(recordings: ExitStack) -> None:
    try:
        recordings.close()
    except VQBeTEdgeError as error:
        _LOG.error("%s", error)


def _check_features(config: VqbetEdgeConfig, manifest: Manifest) -> None:
    """Compare LeRobot's features, which options or an environment may have set, with the bundle's.

    Raises:
        UsageError: they differ.
    """
    ours: dict[str, FeatureSpec] = {**manifest.input_features, **manifest.output_features}
    theirs = {**(config.input_features or {}), **(config.output_features or {})}
    expected = {key: tuple(feature.shape) for key, feature in ours.items()}
    got = {key: tuple(feature.shape) for key, feature in theirs.items()}
    if got != expected:
        raise UsageError(
            f"the bundle has the features {expected}, got {got}; use an environment or a robot "
            "with these, and leave --policy.input_features and --policy.output_features out"
        )


def _rows(batch: dict[str, Tensor], manifest: Manifest) -> Sequence[_Row]:
    """A batch taken apart.

    Raises:
        ObservationError: a feature is missing, or is no batch of the expected shape.
        UsageError: a tensor is not on the CPU.
    """
    shapes = {key: tuple(feature.shape) for key, feature in manifest.input_features.items()}
    columns = {key: _column(batch, key, shape) for key, shape in shapes.items()}
    sizes = {key: len(column) for key, column in columns.items()}
    if len(set(sizes.values())) != 1:
        raise ObservationError(f"expected one batch size, got {sizes}")
    size = next(iter(sizes.values()))
    return [{key: column[row] for key, column in columns.items()} for row in range(size)]


def _column(batch: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> NDArray[Any]:
    value = batch.get(key)
    if not isinstance(value, Tensor):
        present = sorted(name for name in batch if name.startswith("observation."))
        raise ObservationError(
            f"'{key}' is missing: got {present}; name the robot's camera as in training, or rename "
            "it with --rename_map='{NAME: " + key + "}'"
        )
    if value.device.type != "cpu":
        raise UsageError(
            f"'{key}': expected a tensor on the CPU, got {value.device}; start with --device=cpu "
            "and --policy.device=cpu, and choose what computes with --policy.backend"
        )
    if tuple(value.shape[1:]) != shape or not len(value):
        hint = "LeRobot does not resize here: set the camera's height and width"
        raise ObservationError(
            f"'{key}': expected a batch of {shape}, got {tuple(value.shape)}"
            + (f"; {hint} to {shape[1]} and {shape[2]}" if len(shape) == 3 else "")
        )
    return value.numpy()
