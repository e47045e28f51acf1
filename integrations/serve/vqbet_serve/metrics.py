"""What a server counts, as Prometheus' text format (version 0.0.4)."""

import bisect
import threading
from collections import Counter
from collections.abc import Mapping

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of steps, refusals and latency; its methods may be called from any thread.

    Args:
        period_s: seconds between two observations; a step that takes longer is late. None where
            that is not known.
    """

    def __init__(self, period_s: float | None = None) -> None:
        self._period_s = period_s
        self._lock = threading.Lock()
        self._counts = [0] * (len(_BUCKETS) + 1)
        self._seconds = 0.0
        self._steps: Counter[str] = Counter()
        self._late: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._runs = self._windows = 0

    def step(self, seconds: float, robot: str) -> None:
        """An answered request, how long the policy took, and whose it was."""
        with self._lock:
            self._counts[bisect.bisect_left(_BUCKETS, seconds)] += 1
            self._seconds += seconds
            self._steps[robot] += 1
            self._late[robot] += self._period_s is not None and seconds > self._period_s

    def refusal(self, reason: str) -> None:
        """A connection or request that was refused; `reason` is an error's class."""
        with self._lock:
            self._refused[reason] += 1

    def run(self, windows: int) -> None:
        """A run of the transformer for so many robots."""
        with self._lock:
            self._runs += 1
            self._windows += windows

    def text(self, robots: int, idle: Mapping[str, float]) -> str:
        """Everything, for a scraper.

        Args:
            robots: sessions that are open.
            idle: seconds since the latest request, by the name of a robot's key.
        """
        seconds = {name: round(since, 3) for name, since in idle.items()}
        with self._lock:
            return "".join([
                _family("robots", "gauge", "Sessions that are open.", robots),
                _family("robot_idle_seconds", "gauge", "Since the latest request.", seconds),
                _family("robot_steps_total", "counter", "Actions, by key.", self._steps),
                _family("robot_late_steps_total", "counter", "Later than the period.", self._late),
                self._latency(),
                _family("shared_runs_total", "counter", "Runs for several robots.", self._runs),
                _family("shared_windows_total", "counter", "Robots in those runs.", self._windows),
                _family("refusals_total", "counter", "Connections, requests.", self._refused,
                        label="reason"),
            ])  # fmt: skip

    def _latency(self) -> str:
        text, total = _heading("step_seconds", "histogram", "Time the policy took."), 0
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), self._counts, strict=True):
            total += count
            text += f'vqbet_step_seconds_bucket{{le="{bound}"}} {total}\n'
        text += f"vqbet_step_seconds_sum {self._seconds:.6f}\n"
        return f"{text}vqbet_step_seconds_count {total}\n"


def _heading(name: str, kind: str, what: str) -> str:
    return f"# HELP vqbet_{name} {what}\n# TYPE vqbet_{name} {kind}\n"


def _family(
    name: str, kind: str, what: str, values: float | Mapping[str, float], label: str = "robot"
) -> str:
    """One metric: a value, or values by a label."""
    text = _heading(name, kind, what)
    if not isinstance(values, Mapping):
        return f"{text}vqbet_{name} {values}\n"
    return text + "".join(
        f'vqbet_{name}{{{label}="{key}"}} {value}\n' for key, value in sorted(values.items())
    )
