"""`Guards`: what may reach the robot, and what happens when the answer takes too long."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vqbet_edge.errors import UsageError

OnLate = Literal["raise", "hold", "continue"]
# One number for all, or one per action dimension.
PerDimension = float | Sequence[float]


@dataclass(frozen=True)
class Guards:
    """How a policy is kept from moving the robot wrongly.

    Attributes:
        action_limits: what actions are clamped to, in the robot's units: `data`, the range that
            was demonstrated, widened by `margin` (where the bundle does not know it, nothing is
            clamped, and loading says so); a pair (lowest, highest); or None. What was clamped is
            counted, logged once, and shown by `policy.last`.
        margin: by what share of its range `data` is widened on either side.
        max_change: most that an action may differ from the one before, in the robot's units per
            step. An episode's first action is limited where `reset(from_action=...)` said what
            the robot was commanded last, or where it stands; otherwise it is free.
        state_limits: which states are refused: `data`, those that are far from all that was
            demonstrated, outside the range widened by itself on either side; those outside a pair
            (lowest, highest), in the robot's units; None, none: an episode's first far state is
            logged, and all are counted.
        max_age_s: oldest observation that is acted on, in seconds, for calls that say when it was
            taken.
        deadline_s: seconds that `act` may take; None: as long as it takes. With a deadline the
            network runs on a thread of its own.
        on_late: what `act` does when the deadline has passed; must be chosen with `deadline_s`.
            `raise`: a DeadlineError. `hold`: return the last action again, which keeps a position,
            but not a velocity, where it is. `continue`: go on with the chunk that is being
            executed, which takes a `replan_every` of less than the whole chunk. The last two raise
            when there is nothing to return.

    Raises:
        UsageError: a value is out of range.
    """

    action_limits: Literal["data"] | tuple[PerDimension, PerDimension] | None = "data"
    margin: float = 0.1
    max_change: PerDimension | None = None
    state_limits: Literal["data"] | tuple[PerDimension, PerDimension] | None = None
    max_age_s: float = 0.5
    deadline_s: float | None = None
    on_late: OnLate | None = None

    def __post_init__(self) -> None:
        for name in ("margin", "max_age_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not _is_duration(value):
                raise UsageError(f"expected {name} of 0 or more, got {value!r}")
        if (self.deadline_s is None) != (self.on_late is None):
            raise UsageError(
                "deadline_s and on_late belong together: choose on_late='raise', 'hold' or "
                f"'continue'; got deadline_s={self.deadline_s!r}, on_late={self.on_late!r}"
            )
        if self.on_late is not None and self.on_late not in get_args(OnLate):
            raise UsageError(
                f"expected on_late='raise', 'hold' or 'continue', got {self.on_late!r}"
            )


def _is_duration(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf  # type: ignore[operator]
