"""Act on the same windows with their code and with exported bundles, and say how far they differ.

python tools/nyu_parity.py --repository CLONE --checkpoint X.pt --out FOLDER

X.pt is one that nyu_checkpoints.py --full made, or a released one; of another size, say which of
their configurations it runs with, as for their run.py: --overrides loss_fn=vqbet_loss_88256 ...
Exports FP32, FP16 and INT8 into the folder, INT8 calibrated on what the FP32 one's robot saw.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from nyu_reference import (
    Family,
    Step,
    Theirs,
    frame,
    goals,
    grids,
    open_repository,
)
from vqbet_export.config import ExportConfig
from vqbet_export.exporter import export

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.comparison import LIMITS
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.manifest import Precision

EPISODE = 10
# Of FP32; the others keep to docs/engines.md.
FP32_LIMIT = 1e-4
# Their logits vary by about 1; below this lead, rounding may choose another code.
TIE = 1e-3

Observation = dict[str, NDArray[np.uint8] | NDArray[np.float32]]


@dataclass(frozen=True)
class Options:
    """What to compare."""

    repository: Path
    checkpoint: Path
    out: Path
    windows: int = 200
    overrides: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Figures:
    """How far a bundle is from their `step`.

    Attributes:
        precision: of the bundle.
        forced: 99th percentile and largest error of an action's number, of that number's standard
            deviation over their actions, with their codes.
        free: the same without, of windows where both chose the same codes.
        same_codes: share of all windows.
        same_clear_codes: share of windows whose codes lead by more than `TIE`.
    """

    precision: Precision
    forced: tuple[float, float]
    free: tuple[float, float]
    same_codes: float
    same_clear_codes: float

    def violations(self) -> list[str]:
        """What breaks the limits."""
        limits = LIMITS[self.precision]
        most, largest = limits.action, limits.largest_action
        if self.precision == "fp32":
            most = largest = FP32_LIMIT
        pairs = {
            "forced, 99 %": (self.forced[0], most),
            "forced, largest": (self.forced[1], largest),
            "free, 99 %": (self.free[0], most),
            "free, largest": (self.free[1], largest),
        }
        found = [f"{k}: {v:.2g} > {limit:g}" for k, (v, limit) in pairs.items() if not v <= limit]
        if self.precision == "fp32" and self.same_clear_codes < 1:
            found.append(f"clear codes: {self.same_clear_codes:.1%}")
        return found


@dataclass(frozen=True)
class Windows:
    """Frames and goals of episodes of `EPISODE` steps."""

    grids: NDArray[np.uint8]
    goals: NDArray[np.float32]
    has_goal: bool

    @classmethod
    def draw(cls, family: Family, count: int, seed: int) -> "Windows":
        """Random ones."""
        random = np.random.default_rng(seed)
        return cls(grids(random, count), goals(random, count), family.goal)

    def __iter__(self) -> Iterator[tuple[bool, NDArray[np.uint8], NDArray[np.float32]]]:
        """Whether an episode begins, and what is seen."""
        for index, (grid, goal) in enumerate(zip(self.grids, self.goals, strict=True)):
            yield index % EPISODE == 0, frame(grid), goal

    def observations(self) -> Iterator[tuple[bool, Observation]]:
        """The same as `EdgePolicy.act` takes it."""
        for begins, picture, goal in self:
            point = {"observation.goal": goal} if self.has_goal else {}
            yield begins, {"observation.image": picture, **point}


def decide(theirs: Theirs, windows: Windows) -> list[Step]:
    """What their code does."""
    steps = []
    for begins, picture, goal in windows:
        if begins:
            theirs.reset()
        steps.append(theirs.decide(picture, goal))
    return steps


def export_bundle(options: Options, family: Family, precision: Precision) -> Path:
    """Export, unless the bundle is there."""
    bundle, seen = (options.out / f"{family.name}-{kind}" for kind in (precision, "seen"))
    if bundle.exists():
        return bundle
    if precision == "int8" and not seen.exists():
        record(export_bundle(options, family, "fp32"), Windows.draw(family, 240, 7), seen)
    export(
        ExportConfig(
            str(options.checkpoint),
            bundle,
            precision=precision,
            calibration_data=str(seen) if precision == "int8" else None,
            targets=("cpu",),
            verify_steps=64,
        )
    )
    return bundle


def record(bundle: Path, windows: Windows, folder: Path) -> None:
    """What a robot would see, for calibration."""
    with open_policy(bundle) as policy, policy.record(folder):
        for begins, observation in windows.observations():
            if begins:
                policy.reset()
            policy.act(observation)


def open_policy(bundle: Path) -> EdgePolicy:
    """On the CPU, and without limits: their code has none."""
    return EdgePolicy.load(bundle, "onnxruntime", guards=Guards(action_limits=None))


def compare(bundle: Path, precision: Precision, windows: Windows, steps: Sequence[Step]) -> Figures:
    """Play the windows twice: free, and with their codes."""
    wanted = np.stack([each.action for each in steps]).astype(np.float64)
    codes = np.stack([each.codes for each in steps])
    free, forced, chosen = [], [], []
    with open_policy(bundle) as policy:
        for begins, observation in windows.observations():
            if begins:
                policy.reset()
            free.append(policy.act(observation))
            chosen.append(policy.last.codes if policy.last else codes[0])
        for (begins, observation), pair in zip(windows.observations(), codes, strict=True):
            if begins:
                policy.reset()
            forced.append(policy.act_chunk(observation, codes=pair)[0])
    spread = wanted.std(axis=0)
    same = (np.stack(chosen) == codes).all(axis=1)
    ranked = np.sort(np.stack([each.logits for each in steps]), axis=-1)
    clear = (ranked[..., -1] - ranked[..., -2]).min(axis=1) > TIE

    def errors(actions: list[NDArray[np.float32]], rows: NDArray[np.bool_]) -> tuple[float, float]:
        off = (np.abs(np.stack(actions) - wanted) / spread)[rows]
        return float(np.percentile(off, 99)), float(off.max())

    return Figures(
        precision,
        errors(forced, np.ones_like(same)),
        errors(free, same),
        float(same.mean()),
        float(same[clear].mean()),
    )


def main(options: Options) -> None:
    """Print a line a precision; end with 1 if one breaks a limit."""
    family = open_repository(options.repository)
    options.out.mkdir(parents=True, exist_ok=True)
    windows = Windows.draw(family, options.windows, 3)
    steps = decide(Theirs(family, options.checkpoint, family.full, options.overrides), windows)
    pairs = {tuple(each.codes) for each in steps}
    sys.stdout.write(f"{len(steps)} windows, {len(pairs)} different code pairs\n")
    broken = []
    for precision in options.precisions:
        found = compare(export_bundle(options, family, precision), precision, windows, steps)
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
        broken += [f"{precision}: {each}" for each in found.violations()]
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main(tyro.cli(Options))
