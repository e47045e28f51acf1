"""Header stamps on the monotonic clock."""

from collections import deque

from vqbet_edge import StaleObservationError

# How long a jump of the wall clock is remembered; no message may be older and still look new.
MEMORY_S = 1.0


class StampClock:
    """Places stamps of the wall clock on the monotonic clock.

    A stamp has the wall clock of the moment at which it was made, and that clock may have been set
    since. So the distance of the two clocks is remembered for a while, and a stamp is placed where
    it is oldest: a jump makes observations look too old for `MEMORY_S`, never too young.
    """

    def __init__(self, max_ahead: float) -> None:
        # In seconds: the clocks of two computers differ.
        self._max_ahead = max_ahead
        self._distances: deque[tuple[float, int]] = deque()

    def compare(self, wall_ns: int, now: float) -> None:
        """Look at both clocks: wall clock in nanoseconds, `time.monotonic()` in seconds."""
        self._distances.append((now, wall_ns - round(now * 1e9)))
        while self._distances[0][0] < now - MEMORY_S:
            self._distances.popleft()

    def place(self, stamp_ns: int, wall_ns: int, now: float) -> float:
        """The time of a stamp in seconds of `time.monotonic()`, at most `now`.

        Raises:
            StaleObservationError: it is in the future.
        """
        self.compare(wall_ns, now)
        ahead = (stamp_ns - wall_ns) / 1e9
        if ahead > self._max_ahead:
            raise StaleObservationError(
                f"its stamp is {ahead:.3f} s in the future; synchronise the computers' clocks "
                "(chrony, PTP), or set the parameter stamps to 'receive'"
            )
        distance = max(each for _, each in self._distances)
        return min((stamp_ns - distance) / 1e9, now)
