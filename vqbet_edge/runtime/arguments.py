"""What callers pass to a policy, checked."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.backends.base import Floats, Prefetch
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.sampling import Codes


def checked_temperature(temperature: float) -> float:
    """0 (greedy) or more."""
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise UsageError(f"expected a temperature of 0 (greedy) or more, got {temperature!r}")
    return temperature


def checked_seed(seed: int) -> int:
    """0 or more."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(f"expected a seed of 0 or more, got {seed!r}")
    return int(seed)


def checked_replan(replan_every: int | None, chunk_size: int) -> int:
    """1 to the chunk's size, which None stands for."""
    if replan_every is None:
        return chunk_size
    if not isinstance(replan_every, (int, np.integer)) or not 1 <= replan_every <= chunk_size:
        raise UsageError(f"expected replan_every in 1..{chunk_size}, got {replan_every!r}")
    return int(replan_every)


def checked_prefetch(prefetch: Prefetch) -> Prefetch:
    """One of its values."""
    if prefetch not in get_args(Prefetch):
        raise UsageError(f"expected prefetch to be one of {get_args(Prefetch)}, got {prefetch!r}")
    return prefetch


def checked_codes(codes: Sequence[int] | Codes, manifest: Manifest) -> Codes:
    """A code pair that a caller forces, as int64 (2,).

    Raises:
        UsageError: it is no pair, or not in the codebook.
    """
    size = manifest.policy.vqvae_n_embed
    try:
        array = np.asarray(codes)
    except ValueError:  # ragged
        array = np.zeros(0)
    valid = array.shape == (2,) and np.issubdtype(array.dtype, np.integer)
    if not valid or array.min() < 0 or array.max() >= size:
        raise UsageError(f"expected codes (primary, secondary) in 0..{size - 1}, got {codes}")
    return array.astype(np.int64)


def checked_action(name: str, values: ArrayLike, dim: int) -> Floats:
    """An action that a caller gives, as float32 (dim,) of its own.

    Raises:
        UsageError: it has another shape, or is not finite.
    """
    try:
        action = np.array(values, np.float64)
    except (TypeError, ValueError):
        action = np.zeros(0)
    with np.errstate(over="ignore"):
        own: Floats = action.astype(np.float32)
    if own.shape != (dim,) or not np.isfinite(own).all():
        raise UsageError(
            f"expected {name} of {dim} finite numbers, shape ({dim},), in the units of actions; "
            f"got {values!r}"
        )
    return own
