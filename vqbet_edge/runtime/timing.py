"""How long a prediction takes on a loaded backend: is it as fast as the robot needs it?"""

import math
import time

import numpy as np

from vqbet_edge.errors import BackendError, UsageError
from vqbet_edge.runtime.acting import ActingPolicy
from vqbet_edge.runtime.backends.base import Backend, Prefetch
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.observation import Observation

# The first runs are slower than all others.
_WARM_UP, _TIMES = 3, 9
# A machine that has just been started has more to do: so often is looked again.
_ROUNDS = 3


def check_prediction_time(
    bundle: Bundle, backend: Backend, within_s: float, *, prefetch: Prefetch, replan_every: int
) -> None:
    """Refuse a backend whose predictions take longer, in the median of a few, again and again.

    They are those of a robot's loop: what is computed ahead is not counted where steps lie between
    two predictions (`replan_every` above 1), for which it has the time.

    Raises:
        BackendError: it is slower.
        UsageError: `within_s` is no time.
    """
    if not within_s > 0:
        raise UsageError(f"expected predict_within_s above 0, got {within_s!r}")
    found = math.inf
    for _ in range(_ROUNDS):
        found = min(found, _predict(bundle, backend, prefetch, pause=replan_every > 1))
        if found <= within_s:
            return
    expected = f"expected {1e3 * within_s:.3g} ms at most"
    raise BackendError(
        f"a prediction takes {1e3 * found:.3g} ms here on '{backend.name}' (the lowest median of "
        f"{_TIMES} in {_ROUNDS} rounds), {expected}; what a faster backend lacks says: "
        f"vqbet-doctor '{bundle.path}'; or allow more time (predict_within)"
    )


def _predict(bundle: Bundle, backend: Backend, prefetch: Prefetch, *, pause: bool) -> float:
    """Median seconds of a prediction, by a window of its own."""
    manifest = bundle.manifest
    blank: Observation = {
        key: np.zeros(shape, np.uint8 if key in manifest.image_shapes else np.float32)
        for key, shape in manifest.observation_shapes.items()
    }
    policy = _Unguarded(bundle, backend, prefetch)
    try:
        seconds = [policy.seconds(blank, pause=pause) for _ in range(_WARM_UP + _TIMES)]
    finally:
        policy.close()
    return float(np.median(seconds[_WARM_UP:]))


class _Unguarded(ActingPolicy):
    """A robot that may see what nobody demonstrated."""

    def __init__(self, bundle: Bundle, backend: Backend, prefetch: Prefetch) -> None:
        guards = Guards(action_limits=None, state_limits=(-math.inf, math.inf))
        super().__init__(bundle, backend, prefetch=prefetch, guards=guards)

    def seconds(self, observation: Observation, *, pause: bool) -> float:
        """Of one prediction, behind a pause for what is computed ahead."""
        if pause:
            self._prefetching.wait()
        start = time.perf_counter()
        self.act_chunk(observation)
        return time.perf_counter() - start
