"""Beginning a run from another policy: what of it is taken, and whether the data fit it.

`--pretrained` takes the whole network, `--pretrained-vqvae` what phase 1 learned. Either brings the
hyperparameters that the weights were made with, and the statistics that codes mean something by.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from vqbet_edge.errors import UsageError
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.config import (
    ACTION_KEY,
    STATE_KEY,
    Hyperparameters,
    NormalizationMode,
    TrainConfig,
    VQBeTConfig,
    flag,
)
from vqbet_edge.training.files import through_last
from vqbet_edge.training.layouts import STATISTICS_NAME, TRAIN_CONFIG_NAME, read_json
from vqbet_edge.training.network import VQBeT
from vqbet_edge.training.normalization import RANGE, Floats, Statistics

# What weights do not depend on: a run may choose anew.
_FREE = {
    "n_vqvae_training_steps", "crop_is_random", "pretrained_backbone_weights", "dropout",
    "offset_loss_weight", "primary_code_loss_weight", "secondary_code_loss_weight",
    "bet_softmax_temperature", "normalization_mapping",
}  # fmt: skip
# What the VQ-VAE alone is made with.
_VQVAE = (
    "action_chunk_size", "use_relative_actions", "relative_exclude_joints", "vqvae_n_embed",
    "vqvae_embedding_dim", "vqvae_enc_hidden_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """What a run begins with."""

    checkpoint: Checkpoint
    whole: bool  # the policy; else the VQ-VAE alone

    def __str__(self) -> str:
        what = "" if self.whole else "the codes of "
        return f"beginning with {what}{self.checkpoint.name}"

    @property
    def _names(self) -> list[str]:
        """Of the hyperparameters that are taken."""
        return [f.name for f in fields(Hyperparameters)] if self.whole else [*_VQVAE]

    @property
    def _modes(self) -> dict[str, NormalizationMode]:
        modes = self.checkpoint.config.normalization_mapping
        kinds = ("VISUAL", "STATE", "ACTION") if self.whole else ("ACTION",)
        return {kind: modes.get(kind, NormalizationMode.IDENTITY) for kind in kinds}

    def fields(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """See `pretrained_fields`."""
        found = {name: getattr(self.checkpoint.config, name) for name in self._names}
        if self.whole:
            found["cameras"] = tuple(self.checkpoint.image_shapes)
        modes = others.get("normalization_mapping") or Hyperparameters().normalization_mapping
        found["normalization_mapping"] = {**modes, **self._modes}
        name = "pretrained" if self.whole else "pretrained_vqvae"
        return {**others, **found, "n_vqvae_training_steps": 0, name: self.checkpoint.name}

    def check(self, config: TrainConfig, policy: VQBeTConfig) -> None:
        """Refuse a configuration or data that the weights do not fit.

        Raises:
            UsageError: says what differs.
        """
        taken = self.checkpoint.config
        source = f"'{self.checkpoint.name}'"
        for name in (name for name in self._names if name not in _FREE):
            theirs, ours = getattr(taken, name), getattr(policy, name)
            if theirs != ours:
                raise UsageError(
                    f"{source} was trained with {flag(name)} {theirs}, and the run is to have "
                    f"{ours}; leave {flag(name)} out"
                )
        for kind, mode in self._modes.items():
            if not config.new_statistics and config.normalization_mapping[kind] != mode:
                raise UsageError(
                    f"{source} was trained with {flag('normalization_mapping')}.{kind} "
                    f"{mode.value}, and the run is to have "
                    f"{config.normalization_mapping[kind].value}; leave it out, or pass "
                    "--new-statistics"
                )
        if taken.relative_actions != policy.relative_actions:
            raise UsageError(
                f"{source} predicts {_numbers(taken)} as distances from the state, by their names, "
                f"and in {config.dataset} it would be {_numbers(policy)}; name the actions alike"
            )
        for what, theirs, ours in self._shapes(policy):
            if theirs != ours:
                raise UsageError(
                    f"{source} was trained with {what} {theirs}, and {config.dataset} has {ours}; "
                    "pass data of the same robot"
                    + (", or take --pretrained-vqvae alone" if self.whole else "")
                )

    def _shapes(self, policy: VQBeTConfig) -> list[tuple[str, object, object]]:
        taken = self.checkpoint.config
        found: list[tuple[str, object, object]] = [
            ("actions of", taken.action_dim, policy.action_dim)
        ]
        if self.whole:
            found.append(("a state of", taken.state_dim, policy.state_dim))
            found.append(("cameras numbering", len(taken.image_keys), len(policy.image_keys)))
        if self.whole and taken.resize_shape is None:  # what is not shrunk to one size is cropped
            found.append(("images (height, width) of", taken.image_sizes, policy.image_sizes))
        return found

    def statistics(self, policy: VQBeTConfig) -> dict[str, Statistics]:
        """What of a run's features, by its keys, is not scaled by its own data."""
        stored = self.checkpoint.normalization
        if not self.whole:
            stats = stored[ACTION_KEY].stats if ACTION_KEY in stored else {}
            return {ACTION_KEY: {name: stats[name] for name in stats.keys() - {*RANGE}}}
        cameras = zip(policy.image_keys, self.checkpoint.config.image_keys, strict=True)
        keys = {STATE_KEY: STATE_KEY, ACTION_KEY: ACTION_KEY, **dict(cameras)}
        found = {own: dict(stored[key].stats) if key in stored else {} for own, key in keys.items()}
        ranges = self.checkpoint.state_range, self.checkpoint.action_range
        for key, known in zip((STATE_KEY, ACTION_KEY), ranges, strict=True):
            if known is not None:
                found[key] |= dict(zip(RANGE, known, strict=True))
        return {**found}

    def start(self, network: VQBeT) -> None:
        """Give a network the weights; phase 1, where there is one, goes on with its codes."""
        if self.whole:
            network.load_state_dict(self.checkpoint.network.state_dict())
        vqvae = network.head.vqvae_model
        vqvae.load_state_dict(self.checkpoint.network.head.vqvae_model.state_dict())
        vqvae.discretized.fill_(False)
        vqvae.vq_layer.freeze_codebook.fill_(False)


@dataclass(frozen=True)
class Beginning:
    """What of a run comes from another policy."""

    pretrained: Pretrained | None = None  # None too where a run is resumed, which has the weights
    statistics: Mapping[str, Statistics] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig, policy: VQBeTConfig) -> "Beginning":
        """From the checkpoint that the configuration names, or the run's own newest one.

        Raises:
            CheckpointError, HubError: as `load_checkpoint` does.
            UsageError: the configuration or the data do not fit the checkpoint.
        """
        name, whole = config.pretrained or config.pretrained_vqvae, config.pretrained is not None
        if name is None:
            return cls()
        own = _newest(config.output) if config.resume else None
        if own is not None:
            return cls(statistics={} if config.new_statistics else _kept(own, whole=whole))
        taken = Pretrained(load_checkpoint(name, codes_alone=not whole), whole)
        taken.check(config, policy)
        return cls(taken, {} if config.new_statistics else taken.statistics(policy))


def pretrained_fields(
    source: str, *, vqvae_alone: bool = False, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of `TrainConfig` for a run that begins from a checkpoint and skips phase 1.

        TrainConfig(**pretrained_fields(CHECKPOINT), dataset=..., output=..., steps=1000)

    Args:
        source: see `load_checkpoint`.
        vqvae_alone: as `--pretrained-vqvae`.
        others: fields that give way to the checkpoint's, such as a recipe's.

    Raises:
        CheckpointError, HubError: as `load_checkpoint` does.
    """
    taken = load_checkpoint(source, codes_alone=vqvae_alone)
    return Pretrained(taken, not vqvae_alone).fields(others or {})


def resumed_fields(output: Path) -> dict[str, Any]:
    """The same of a run that began so: its checkpoint may be gone. Empty where nothing was saved.

    Raises:
        CheckpointError: the run's newest checkpoint is not whole.
    """
    own = _newest(output)
    names = {f.name for f in fields(Hyperparameters)}
    names |= {"cameras", "pretrained", "pretrained_vqvae"}
    stored = {} if own is None else read_json(own / TRAIN_CONFIG_NAME)
    if not (stored.get("pretrained") or stored.get("pretrained_vqvae")):
        return {}
    return {name: value for name, value in stored.items() if name in names}


def _newest(output: Path) -> Path | None:
    path = through_last(output / "checkpoints" / "last" / "pretrained_model")
    return path if path.is_dir() else None


def _numbers(config: VQBeTConfig) -> list[int]:
    return [i for i, relative in enumerate(config.relative_actions) if relative]


def _kept(own: Path, *, whole: bool) -> dict[str, Statistics]:
    """What a run that is resumed did not take from its data."""
    found: dict[str, dict[str, Floats]] = {}
    try:
        stored = safetensors.numpy.load_file(own / STATISTICS_NAME)
    except (OSError, safetensors.SafetensorError):  # what is not whole, `Checkpoints` names
        stored = {}
    for name, value in stored.items():
        key, _, statistic = name.rpartition(".")
        if whole or key == ACTION_KEY:
            found.setdefault(key, {})[statistic] = value
    return {**found}
