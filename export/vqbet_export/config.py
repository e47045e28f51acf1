"""What to export and how."""

from dataclasses import dataclass
from pathlib import Path

from vqbet_edge.runtime.manifest import TARGETS, ActionKind, Precision, Target


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        checkpoint: a model.safetensors, its directory, or a Hub repository id.
        output: the bundle's directory.
        precision: of convolutions and matrix products; INT8 needs `calibration_data`.
        verify_data: a LeRobot data set to verify on, besides random observations; None takes the
            one that the checkpoint names, if it is at hand.
        verify_steps: observations of each kind to verify on; of few, one near tie between codes
            is already a share above the limit.
        force: replace an existing bundle.
        calibration_data: a LeRobot data set or a folder of recordings, for INT8.
        calibration_steps: observations to sample from it.
        targets: whom the bundle has graphs for.
        fps: observations a second; None takes what checkpoint and data sets say.
        action_kinds: what each number of an action is, or one for all; empty takes what the names
            in the data set say.
        real_cases: whether the bundle may carry pictures that it was verified on, as its reference
            cases; False takes noise.
    """

    checkpoint: str
    output: Path
    precision: Precision = "fp32"
    verify_data: str | None = None
    verify_steps: int = 512
    force: bool = False
    calibration_data: str | None = None
    calibration_steps: int = 1024
    targets: tuple[Target, ...] = TARGETS
    fps: float | None = None
    action_kinds: tuple[ActionKind, ...] = ()
    real_cases: bool = True
