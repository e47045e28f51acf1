"""The demonstrations behind a checkpoint: what they say about it, and what nobody says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vqbet_edge.errors import DatasetError, UsageError
from vqbet_edge.runtime.manifest import ActionKind, Manifest
from vqbet_edge.training.config import ACTION_KEY, NormalizationMode
from vqbet_edge.training.dataset.dataset import at_hand
from vqbet_edge.training.dataset.samples import Sampler, Source, open_source
from vqbet_edge.training.description import describe
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_edge.training.layouts import Normalization
from vqbet_edge.training.normalization import RANGE
from vqbet_export.config import ExportConfig
from vqbet_export.verification import Verification

# LeRobot's own endings of a motor's names.
_KINDS: dict[str, ActionKind] = {".pos": "position", ".vel": "velocity"}
# Below this share of clear codes, their agreement tells little.
_FEW = 0.25


@dataclass(frozen=True)
class Demonstrations:
    """What the export knows of the demonstrations.

    Attributes:
        source: a data set or a recording; None where none is at hand.
        sampler: pieces of it to verify on; None where it is only calibrated on, or none is.
        notes: what to tell the user.
    """

    source: Source | None = None
    sampler: Sampler | None = None
    notes: tuple[str, ...] = ()

    def complete(self, checkpoint: AnyCheckpoint, config: ExportConfig) -> AnyCheckpoint:
        """The checkpoint, with what its own files do not say: rate, ranges, kinds of actions.

        Raises:
            UsageError: `action_kinds` are not one, nor one for each number of an action.
        """
        fps = config.fps or checkpoint.fps or (None if self.source is None else self.source.fps)
        scalings = dict(checkpoint.normalization)
        if checkpoint.state_dim and checkpoint.state_range is None:
            self._add_range(scalings, checkpoint.vector_key, checkpoint.state_key)
        if checkpoint.action_range is None:
            self._add_range(scalings, ACTION_KEY, ACTION_KEY)
        kinds = self._kinds(config.action_kinds, checkpoint.action_dim) or checkpoint.action_kinds
        # Whole numbers are spelled otherwise in a manifest than they are read.
        fps = None if fps is None else float(fps)
        return replace(checkpoint, fps=fps, normalization=scalings, action_kinds=kinds)

    def _add_range(self, scalings: dict[str, Normalization], key: str, named: str) -> None:
        found = None if self.source is None else self.source.demonstrated(named)
        if found is not None:
            how = scalings.get(key, Normalization(NormalizationMode.IDENTITY))
            stats = {**how.stats, **dict(zip(RANGE, found, strict=True))}
            scalings[key] = replace(how, stats=stats)

    def _kinds(self, given: Sequence[ActionKind], width: int) -> tuple[ActionKind, ...]:
        if len(given) == 1:
            return (given[0],) * width
        if given and len(given) != width:
            raise UsageError(
                f"--action-kinds takes one kind, or one for each of the {width} numbers of an "
                f"action, got {len(given)}"
            )
        if given:
            return tuple(given)
        names = () if self.source is None else self.source.names(ACTION_KEY)
        return tuple(map(_kind, names)) if len(names) == width else ()


def _kind(name: str) -> ActionKind:
    if "gripper" in name:
        return "gripper"
    return next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), "unknown")


def find_demonstrations(checkpoint: AnyCheckpoint, config: ExportConfig) -> Demonstrations:
    """The data that the user names, else what the checkpoint names where it is at hand.

    Raises:
        DatasetError: data that the user named does not fit.
        HubError: it is not here and not to be had from the Hub.
    """
    manifest = describe(checkpoint, "fp32")
    if config.verify_data is not None:
        sampler = Sampler.open(config.verify_data, manifest)
        return Demonstrations(sampler.source, sampler)
    if config.calibration_data is not None:
        return Demonstrations(open_source(config.calibration_data))
    named = checkpoint.dataset
    here = None if named is None else at_hand(named)
    if here is None:
        what = "names no data set" if named is None else f"names '{named}', which is not here"
        note = (
            f"verified on noise only: the checkpoint {what}; pass --verify-data DATASET to verify "
            "on what its cameras see"
        )
        return Demonstrations(notes=(note,))
    try:
        sampler = Sampler.open(here, manifest)
    except (DatasetError, UsageError) as error:
        note = f"verified on noise only: the checkpoint names '{named}', but {error}"
        return Demonstrations(notes=(note,))
    return Demonstrations(
        sampler.source, sampler, (f"verified on '{named}', which the checkpoint names",)
    )


def notes_on(
    manifest: Manifest, checkpoint: AnyCheckpoint, results: Sequence[Verification]
) -> list[str]:
    """What a user should know about a bundle."""
    found = list(checkpoint.notes)
    if checkpoint.action_range is None:
        found.append(
            "nobody says which actions were demonstrated, so none are clamped: pass --verify-data "
            "DATASET with the demonstrations, or Guards(action_limits=(lowest, highest)) on the "
            "robot"
        )
    if manifest.fps is None:
        found.append(
            "nobody says how fast the demonstrations were: pass --fps, or drive the policy at "
            "their rate"
        )
    if manifest.verification is not None and manifest.verification.cases == "dataset":
        found.append(
            "the bundle carries frames that its cameras saw, as reference cases: "
            "--no-real-cases takes noise instead"
        )
    clear = min(result.policy.clear for result in results)
    if clear < _FEW:
        found.append(
            f"only {clear:.0%} of the observations have codes that are clear of ties, so their "
            "agreement tells little; logits and actions were compared in all"
        )
    return found
