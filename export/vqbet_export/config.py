"""What to export and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vqbet_edge.runtime.manifest import TARGETS, ActionKind, Precision, Target

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how; the command's options.

    Attributes:
        checkpoint: a model.safetensors that LeRobot or vqbet-train wrote, its directory, or a Hub
            id (user/name, user/name@revision); or a .pt of Robot Utility Models or
            Contact-Anchored Policies.
        output: the bundle to write.
        precision: of convolutions and matrix products; INT8 needs `calibration_data`.
        verify_data: a LeRobot data set (folder or Hub id) to verify on, besides random
            observations; by default the one that the checkpoint names, if it is at hand.
        verify_steps: observations of each kind to verify on; of few, one near tie between codes
            is already a share above the limit.
        force: replace an existing bundle.
        calibration_data: what to calibrate INT8 on: a LeRobot data set (folder or Hub id), or a
            folder that `policy.record` wrote on the robot.
        calibration_steps: observations to take from it.
        targets: whom the bundle has graphs for.
        fps: observations a second of the demonstrations; by default what checkpoint and data sets
            say.
        action_kinds: what each number of an action is, or one for all; by default what the data
            set's names say.
        real_cases: may the bundle carry frames that cameras saw, as its reference cases? If not, it
            proves itself on noise.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    precision: Annotated[Precision, tyro.conf.Fixed, tyro.conf.Suppress] = "fp32"
    verify_data: Annotated[str | None, tyro.conf.arg(metavar="DATASET")] = None
    verify_steps: int = 512
    force: Flag = False
    calibration_data: Annotated[str | None, tyro.conf.arg(metavar="DATASET")] = None
    calibration_steps: int = 1024
    targets: Annotated[tuple[Target, ...], tyro.conf.Fixed, tyro.conf.Suppress] = TARGETS
    fps: float | None = None
    action_kinds: tuple[ActionKind, ...] = ()
    real_cases: Flag = True
