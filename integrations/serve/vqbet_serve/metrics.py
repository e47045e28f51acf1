"""What a server counts, as Prometheus' text format (version 0.0.4)."""

import bisect
import threading

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of steps, refusals and latency; its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(_BUCKETS) + 1)
        self._seconds = 0.0
        self._refused: dict[str, int] = {}
        self._runs = self._windows = 0

    def step(self, seconds: float) -> None:
        """An answered request and how long the policy took."""
        with self._lock:
            self._counts[bisect.bisect_left(_BUCKETS, seconds)] += 1
            self._seconds += seconds

    def refusal(self, reason: str) -> None:
        """A connection or request that was refused; `reason` is an error's class."""
        with self._lock:
            self._refused[reason] = self._refused.get(reason, 0) + 1

    def run(self, windows: int) -> None:
        """A run of the transformer for so many robots."""
        with self._lock:
            self._runs += 1
            self._windows += windows

    def text(self, robots: int) -> str:
        """Everything, for a scraper."""
        with self._lock:
            counts, seconds, refused = list(self._counts), self._seconds, dict(self._refused)
            runs, windows = self._runs, self._windows
        lines = [
            "# HELP vqbet_robots Sessions that are open.",
            "# TYPE vqbet_robots gauge",
            f"vqbet_robots {robots}",
            "# HELP vqbet_step_seconds Time the policy took per observation.",
            "# TYPE vqbet_step_seconds histogram",
        ]
        total = 0
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), counts, strict=True):
            total += count
            lines.append(f'vqbet_step_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"vqbet_step_seconds_sum {seconds:.6f}", f"vqbet_step_seconds_count {total}"]
        lines += [
            "# HELP vqbet_shared_runs_total Runs of the transformer for several robots.",
            "# TYPE vqbet_shared_runs_total counter",
            f"vqbet_shared_runs_total {runs}",
            "# HELP vqbet_shared_windows_total Robots' windows in those runs.",
            "# TYPE vqbet_shared_windows_total counter",
            f"vqbet_shared_windows_total {windows}",
            "# HELP vqbet_refusals_total Refused connections and requests.",
            "# TYPE vqbet_refusals_total counter",
            *(f'vqbet_refusals_total{{reason="{r}"}} {n}' for r, n in sorted(refused.items())),
        ]
        return "\n".join(lines) + "\n"
