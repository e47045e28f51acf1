"""The builder's progress on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vqbet_engines.builder import OnEvent
from vqbet_engines.messages import Notice, Progress


@contextmanager
def build_progress(console: Console) -> Iterator[OnEvent]:
    """Show a bar per phase of the build, phases inside others indented; yields the listener."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Bars(*columns, console=console, transient=True) as bars:
        yield _Listener(bars)


class _Listener:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._depths: dict[str, int] = {}

    def __call__(self, event: Progress | Notice) -> None:
        match event:
            case Notice(text):
                self._bars.console.print(text, highlight=False, markup=False)
            case Progress(steps=0):
                pass  # one of a thousand nodes; it matters in an error only
            case Progress(phase, parent, steps, done):
                self._update(phase, parent, steps, done)

    def _update(self, phase: str, parent: str | None, steps: int, done: int) -> None:
        if phase not in self._tasks:
            self._depths[phase] = depth = self._depths.get(parent or "", -1) + 1
            self._tasks[phase] = self._bars.add_task("  " * depth + phase, total=steps)
        self._bars.update(self._tasks[phase], completed=done, total=steps)
        if done >= steps:
            self._bars.remove_task(self._tasks.pop(phase))
