"""Scaling of states and actions between the robot's units and the network's."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import BundleError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Affine:
    """`y = (x - subtract) * multiply + add`, element by element along the last axis.

    Three terms instead of two: a constant feature has a huge multiplier (LeRobot divides by
    1e-8), and folding it into one sum would cancel catastrophically in float32.

    Attributes:
        subtract, multiply, add: float32 (dim,).
    """

    subtract: Floats
    multiply: Floats
    add: Floats

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Floats], key: str, dim: int) -> "Affine":
        """Take `<key>.subtract`, `.multiply` and `.add` of width `dim` from a bundle's arrays."""
        terms = [arrays.get(f"{key}.{term}") for term in ("subtract", "multiply", "add")]
        for term in terms:
            if term is None or term.shape != (dim,) or not np.isfinite(term).all():
                raise BundleError(f"the bundle's scaling of '{key}' is not finite (3 x {dim})")
        subtract, multiply, add = terms
        return cls(subtract, multiply, add)  # type: ignore[arg-type]

    @classmethod
    def identity(cls, dim: int) -> "Affine":
        """What changes nothing."""
        zeros = np.zeros(dim, np.float32)
        return cls(zeros, np.ones(dim, np.float32), zeros)

    def apply(self, x: Floats, out: Floats | None = None) -> Floats:
        """Scale `x` (..., dim) into `out`, which may be `x` itself; None makes a new array."""
        out = np.subtract(x, self.subtract, out=out)
        np.multiply(out, self.multiply, out=out)
        np.add(out, self.add, out=out)
        return out
