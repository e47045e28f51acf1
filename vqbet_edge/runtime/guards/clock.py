"""The time of observations, on the monotonic clock alone: the wall clock may be set back."""

import math
import time

from vqbet_edge.errors import StaleObservationError

# The camera's driver may stamp a frame a moment after `act` has looked at the clock.
_AHEAD = 0.001


class ObservationClock:
    """Refuses observations that are too old, come twice or in the wrong order."""

    def __init__(self, max_age_s: float) -> None:
        self._max_age = max_age_s
        self._latest: float | None = None

    def clear(self) -> None:
        """The next observation follows none."""
        self._latest = None

    def check(self, stamp: float | None) -> None:
        """Compare an observation's time, seconds of `time.monotonic()`, with now and the latest.

        Raises:
            StaleObservationError: it is older than allowed, in the future, not after the latest
                one, or missing though the latest one had it.
        """
        if stamp is None:
            if self._latest is not None:
                raise StaleObservationError(
                    "observation_time is missing, but the observation before had it; pass it on "
                    "every call of an episode or on none"
                )
            return
        now, number = time.monotonic(), isinstance(stamp, int | float)
        if not number or not math.isfinite(stamp) or stamp > now + _AHEAD:
            raise StaleObservationError(
                f"expected observation_time in seconds of time.monotonic(), now {now:.3f}, got "
                f"{stamp!r}; time.time() and the clocks of other machines do not do"
            )
        if now - stamp > self._max_age:
            raise StaleObservationError(
                f"the observation is {now - stamp:.3f} s old, expected {self._max_age} s at most; "
                "look at the camera's driver, or allow more with Guards(max_age_s=...)"
            )
        if self._latest is not None and stamp <= self._latest:
            order = "again" if stamp == self._latest else "after a newer one"
            raise StaleObservationError(
                f"the observation of {stamp:.6f} came {order}, expected one after "
                f"{self._latest:.6f}; pass every observation once, in order"
            )

    def accept(self, stamp: float | None) -> None:
        """Take an observation's time as the latest, once the observation is accepted."""
        self._latest = stamp
