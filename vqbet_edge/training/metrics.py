"""What a run reports: metrics.jsonl, a progress bar and curves."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from vqbet_edge.errors import UsageError
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.files import replace_bytes, writing

Metrics = Mapping[str, float]
Record = dict[str, Any]

# Panels of the curves: title, kind of record, metrics.
_PANELS = [
    ("phase 1: reconstruction (L1, normalised)", "phase 1", ["reconstruction"]),
    ("phase 1: code pairs in use", "codes", ["code_pairs_used"]),
    ("phase 2: focal losses", "phase 2", ["primary", "secondary"]),
    ("phase 2: predicted chunk (L1, normalised)", "phase 2", ["offset"]),
    ("phase 2: sampled code is the chunk's", "phase 2", ["primary_accuracy", "secondary_accuracy"]),
    ("learning rate", "phase 2", ["lr"]),
]


# So many steps behind the first of a phase say how long the rest takes; of few, nobody asks.
_ESTIMATED_BY, _WORTH_SAYING = 10, 200
# Lines of metrics that a mean is taken of: a batch by itself says little.
_LATEST = 10


class Means:
    """Losses since the last line, summed where they are computed, so that no step waits for them.

    Args:
        sums, count: what a checkpoint had kept of them.
        device: where they are computed.
    """

    def __init__(self, sums: Sequence[float], count: int, device: torch.device) -> None:
        self._sums = torch.tensor(sums, device=device) if count else None
        self._count = count

    def add(self, losses: Sequence[Tensor]) -> None:
        """One step's losses, () each."""
        values = torch.stack([value.detach() for value in losses])
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def kept(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Fields of `Progress`; `reduce` takes the mean over processes."""
        sums = () if self._sums is None else tuple(reduce(self._sums).tolist())
        return {"sums": sums, "summed": self._count}

    def take(self, reduce: Callable[[Tensor], Tensor]) -> list[float]:
        """The means, and begin anew."""
        assert self._sums is not None, "no step since the last line"  # noqa: S101
        means: list[float] = reduce(self._sums / self._count).tolist()
        self._sums, self._count = None, 0
        return means


class Pace:
    """How fast one phase's steps are, without what is done between them."""

    def __init__(self, phase: str, batch_size: int, left: int) -> None:
        self._phase, self._batch_size, self._left = phase, batch_size, left
        self._steps = self._recent = 0
        self._seconds = self._waited = self._measured = 0.0

    def add(self, seconds: float, waited: float) -> str:
        """One step, and how much of it waited for data; at times what to say about the rest."""
        self._steps += 1
        self._recent += 1
        self._seconds += seconds
        self._waited += waited
        # The first one decodes or compiles.
        self._measured += seconds if self._steps > 1 else 0
        if self._steps != _ESTIMATED_BY + 1 or self._left < _WORTH_SAYING:
            return ""
        each = self._measured / _ESTIMATED_BY
        minutes = (self._left - self._steps) * each / 60
        time = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
        return f"{self._phase}: {self._left} steps of {each:.3g} s take about {time}"

    def take(self) -> dict[str, float]:
        """Figures since the last call."""
        found = {
            "samples_per_second": self._recent * self._batch_size / max(self._seconds, 1e-9),
            "data_share": self._waited / max(self._seconds, 1e-9),
        }
        self._recent, self._seconds, self._waited = 0, 0.0, 0.0
        return found


class Reporter:
    """Writes metrics, and moves a bar while it is entered; silent but on the first process.

    Args:
        config: of the run.
        step: that it goes on from.
        active: whether this is the first process.
        track: takes what else wants to know the metrics, and their step.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: int,
        active: bool,
        track: Callable[[dict[str, float], int], None],
    ) -> None:
        self._track = track
        self._path = config.output / "metrics.jsonl"
        self._active = active
        console = Console(stderr=True, quiet=not active)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not active,
        )
        self._task = self.bar.add_task("starting", total=config.steps, completed=step, losses="")
        if active:
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # What an interrupted run wrote after the checkpoint that is gone on from.
                kept = [json.dumps(r) + "\n" for r in read_metrics(self._path) if r["step"] <= step]
                replace_bytes(self._path, "".join(kept).encode())

    def record(self, step: int, kind: str, metrics: Metrics) -> None:
        """Write one line: the step, what kind of metrics, and the metrics."""
        if not self._active:
            return
        # Opened for every line, so that a kill costs no more than the line being written.
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        self._track({f"{kind}/{name}": value for name, value in metrics.items()}, step)

    def progress(self, step: int, phase: str, metrics: Metrics | None = None) -> None:
        """Move the bar."""
        fields = {}
        if metrics is not None:
            fields["losses"] = "  ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:4])
        self.bar.update(self._task, completed=step, description=phase, **fields)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        """Say something to the person who waits."""
        self.bar.console.print(text, highlight=False)


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is not there: accelerate would leave it out.

    Raises:
        UsageError: says what to install.
    """
    if name is not None and name not in map(str, get_available_trackers()):
        raise UsageError(f"--log-with {name} needs its package: pip install {name}")


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Begin what `--log-with` names, with the run's configuration."""
    plain = {
        name: value if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in config.to_json().items()
    }
    own = {"name": config.output.name, "dir": str(config.output)}
    accelerator.init_trackers("vqbet-train", plain, {"wandb": own})


def read_metrics(path: Path) -> list[Record]:
    """All whole lines of a metrics file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # A kill may have interrupted the last line.
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def draw_curves(records: Sequence[Record], target: Path) -> None:
    """Training curves, validation dashed, of what `read_metrics` found."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    for axis, (title, kind, names) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        for color, name in enumerate(names):
            for suffix, style in (("", "-"), (" validation", "--")):
                points = _points(records, kind + suffix, name)
                axis.plot(*points, style, color=f"C{color}", label=f"{name}{suffix}")
        if len(names) > 1:
            axis.legend()
    with writing(target):
        figure.savefig(target, dpi=120)


def overfitting(records: Sequence[Record]) -> str:
    """What to say about a network that learns its demonstrations by heart; empty if none does.

    The primary code's loss decides: in validation a tenth above its lowest, and in training half of
    that or less.
    """
    steps, kept = _points(records, "phase 2 validation", "primary")
    trained = _points(records, "phase 2", "primary")[1][-_LATEST:]
    if not kept or not trained:
        return ""
    lowest, last, own = min(kept), kept[-1], sum(trained) / len(trained)
    if last < 1.1 * lowest or own > last / 2:
        return ""
    return (
        f"[yellow]the network learns its demonstrations by heart: the primary code's loss is "
        f"{own:.2f} on them and {last:.2f} on those kept for validation, where it was lowest "
        f"({lowest:.2f}) at step {steps[kept.index(lowest)]}. More demonstrations may "
        "help, a --crop-shape with more margin, or fewer --steps. What the robot does may go on "
        "getting better all the same: compare checkpoints with vqbet-eval"
    )


def _points(records: Sequence[Record], kind: str, name: str) -> tuple[list[int], list[float]]:
    found = [r for r in records if r["kind"] == kind and name in r]
    return [r["step"] for r in found], [r[name] for r in found]
