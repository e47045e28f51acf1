"""What the node says about itself once a second."""

import threading
from collections import Counter, deque

import numpy as np
from numpy.typing import NDArray

from vqbet_edge_ros.watchdog import Mode

# Steps that percentiles are taken of.
_STEPS = 300


# Of diagnostic_msgs/DiagnosticStatus.
OK, WARN, ERROR = b"\x00", b"\x01", b"\x02"


def level(mode: Mode) -> bytes:
    """How bad it is that the robot is in this mode."""
    match mode:
        case Mode.RUNNING | Mode.TELEOP | Mode.CLOSED:
            return OK
        case Mode.STARTING | Mode.STOPPED:
            return WARN
        case Mode.WAITING:
            return ERROR


class Statistics:
    """What happened since the node was configured; written by one thread, read by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._acting: deque[float] = deque(maxlen=_STEPS)
        self._ages: deque[float] = deque(maxlen=_STEPS)
        self._sent: deque[float] = deque(maxlen=_STEPS)

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
            self._acting.append(seconds)
            self._ages.append(age)
            self._sent.append(now)

    @property
    def counts(self) -> dict[str, int]:
        """Of all causes."""
        with self._lock:
            return dict(self._counts)

    def summary(self) -> dict[str, str]:
        """Counts, and milliseconds of the latest steps."""
        with self._lock:
            found = {name: str(count) for name, count in sorted(self._counts.items())}
            periods = np.diff(np.array(self._sent))
            series = {"act_ms": self._acting, "age_ms": self._ages, "period_ms": periods}
            for name, values in series.items():
                found |= _percentiles(name, np.array(values, np.float64) * 1e3)
            return found


def _percentiles(name: str, values: NDArray[np.float64]) -> dict[str, str]:
    if not len(values):
        return {}
    figures = [*np.percentile(values, [50, 95, 99]), values.max()]
    names = ("p50", "p95", "p99", "max")
    return {f"{name}_{which}": f"{v:.2f}" for which, v in zip(names, figures, strict=True)}
