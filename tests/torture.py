"""How many cases a test tries: one of each kind, some in `make test-all`, all in `make torture`."""

import os
from typing import Any

import pytest

FULL = bool(os.environ.get("VQBET_EDGE_TORTURE"))


def cases(few: int, full: int) -> int:
    """As many cases as this run has time for."""
    return full if FULL else few


def counts(one: int, few: int, full: int) -> list[Any]:
    """Values of a parameter: the fewest in every run, more where time is taken."""
    return [one, pytest.param(cases(few, full), marks=pytest.mark.extended)]
