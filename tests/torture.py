"""How many cases a test tries: few in every run, all of them with `make torture`."""

import os

FULL = bool(os.environ.get("VQBET_EDGE_TORTURE"))


def cases(few: int, full: int) -> int:
    """As many cases as this run has time for."""
    return full if FULL else few
