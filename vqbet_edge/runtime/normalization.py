"""Scaling of states and actions between the robot's units and the network's."""

from collections.abc import Mapping, Sequence
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
        names = ("subtract", "multiply", "add")
        terms = [arrays.get(f"{key}.{name}", np.zeros(0, np.float32)) for name in names]
        if any(term.shape != (dim,) or not np.isfinite(term).all() for term in terms):
            raise BundleError(f"the bundle's scaling of '{key}' is not finite (3 x {dim})")
        return cls(*terms)

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


@dataclass(frozen=True)
class ActionScaling:
    """From what the network predicts to actions in the robot's units.

    Relative actions (openpi's `DeltaActions`, LeRobot's `RelativeActionsProcessorStep`) are
    distances from the state that their chunk was predicted on: action i from state i.

    Attributes:
        affine: network units -> the robot's.
        relative: bool (A,), which actions are distances.
        base: normalised state (A,) -> what is added to every action of the chunk; None where no
            action is relative.
        limits: float32 (2, A), the lowest and highest demonstrated actions in the robot's units;
            None where they are not known.
    """

    affine: Affine
    relative: NDArray[np.bool_]
    base: Affine | None
    limits: Floats | None

    @classmethod
    def of(
        cls, affine: Affine, state: Affine, relative: Sequence[bool], limits: Floats | None
    ) -> "ActionScaling":
        """From a `state` scaling, robot -> network, and which actions are distances (A,) or ()."""
        dim = len(affine.add)
        mask = np.array(relative or [False] * dim)
        if not mask.any():
            return cls(affine, mask, None, limits)
        part = state.add[:dim], mask / state.multiply[:dim], mask * state.subtract[:dim]
        base = Affine(*(term.astype(np.float32) for term in part))
        return cls(affine, mask, base, limits)

    def apply(self, chunks: Floats, states: Floats, out: Floats | None = None) -> Floats:
        """Scale chunks (..., W, A) that were predicted on states (..., S), both normalised.

        Into `out`, which may be `chunks` itself; None makes a new array.
        """
        out = self.affine.apply(chunks, out)
        if self.base is not None:
            out += self.base.apply(states[..., : out.shape[-1]])[..., None, :]
        return out
