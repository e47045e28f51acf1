"""What the doctor says: one thing that was looked at, and what to type about it."""

from typing import Literal

from msgspec import Struct

State = Literal["ok", "note", "problem"]


class Fix(Struct, frozen=True):
    """What to type, and the documentation that it was checked against; empty when it was not."""

    command: str
    source: str = ""

    def __str__(self) -> str:
        return self.command if self.source else f"{self.command}  # not checked"


class Finding(Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `problem` stops the robot or the build, `note` makes it slower than it could be.
        value: what was found.
        fix: what to type; None when there is nothing to fix, or nothing to type for it.
    """

    name: str
    state: State
    value: str
    fix: Fix | None = None
