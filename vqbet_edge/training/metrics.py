"""What a run reports while it goes on: metrics.jsonl, a progress bar, TensorBoard on request."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import Self

from vqbet_edge.errors import UsageError
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.files import replace_bytes, writing

Metrics = Mapping[str, float]


class Reporter:
    """Writes metrics; on every process but the first it does nothing."""

    def __init__(self, config: TrainConfig, step: int, active: bool) -> None:
        self._active = active
        self.path = config.output / "metrics.jsonl"
        self.console = Console(stderr=True, quiet=not active)
        self._file: IO[str] | None = None
        if active:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _forget_after(self.path, step)
                # Line by line, so that a kill costs no more than the line being written.
                self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._board = _open_board(config) if active and config.tensorboard else None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self.console,
            disable=not active,
        )
        self._task = self._bar.add_task("starting", total=config.steps, completed=step, losses="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def record(self, step: int, kind: str, metrics: Metrics) -> None:
        """Write one line: the step, what kind of metrics, and the metrics."""
        if self._file is None:
            return
        with writing(self.path):
            self._file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, stage: str, metrics: Metrics | None = None) -> None:
        """Move the bar."""
        fields: dict[str, str] = {}
        if metrics is not None:
            fields["losses"] = "  ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:4])
        self._bar.update(self._task, completed=step, description=stage, **fields)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        """Say something to the person who waits."""
        self.console.print(text, highlight=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # A kill may have interrupted the last line.
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _forget_after(path: Path, step: int) -> None:
    """Drop what an interrupted run wrote after the checkpoint that is gone on from."""
    kept = [json.dumps(r) + "\n" for r in read_metrics(path) if r["step"] <= step]
    replace_bytes(path, "".join(kept).encode())


def _open_board(config: TrainConfig) -> Any:  # noqa: ANN401 - its type needs the optional library
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional, and slow
    except ImportError as e:
        raise UsageError("--tensorboard needs it installed: pip install tensorboard") from e
    return SummaryWriter(str(config.output / "tensorboard"))
