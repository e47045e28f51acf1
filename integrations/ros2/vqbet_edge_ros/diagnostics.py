"""What the node says about itself once a second."""

import threading
from collections import Counter, deque

import numpy as np

from vqbet_edge_ros.watchdog import Mode

# Steps that percentiles are taken of.
_STEPS = 300
# Of diagnostic_msgs/DiagnosticStatus.
OK, WARN, ERROR = b"\x00", b"\x01", b"\x02"


# How bad it is that the robot is in a mode.
LEVELS = dict.fromkeys(Mode, OK) | {
    Mode.STARTING: WARN, Mode.STOPPED: WARN, Mode.WAITING: ERROR,
}  # fmt: skip


class Statistics:
    """What happened since the node was configured; written by one thread, read by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        # Seconds that `act` took, the observation's age when the command was sent, and when it was.
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=_STEPS)

    def count(self, what: str) -> None:
        """One more."""
        with self._lock:
            self._counts[what] += 1

    def acted(self, seconds: float, age: float, now: float) -> None:
        """A command was sent.

        Args:
            seconds: that `act` took.
            age: of the observation's oldest part when the command was sent.
            now: when it was sent.
        """
        with self._lock:
            self._counts["commands"] += 1
            self._steps.append((seconds, age, now))

    @property
    def counts(self) -> dict[str, int]:
        """Of all causes."""
        with self._lock:
            return dict(self._counts)

    def summary(self) -> dict[str, str]:
        """Counts, and milliseconds of the latest steps."""
        with self._lock:
            found = {name: str(count) for name, count in sorted(self._counts.items())}
            acting, ages, sent = 1e3 * np.array(self._steps, np.float64).reshape(-1, 3).T
        series = {"act_ms": acting, "age_ms": ages, "period_ms": np.diff(sent)}
        for name, values in series.items():
            if len(values):
                figures = [*np.percentile(values, [50, 95, 99]), values.max()]
                for which, figure in zip(("p50", "p95", "p99", "max"), figures, strict=True):
                    found[f"{name}_{which}"] = f"{figure:.2f}"
        return found
