"""What stands between a network and a moving arm; `Guards` says how."""

from vqbet_edge.runtime.guards.actions import GuardCounts
from vqbet_edge.runtime.guards.config import Guards, OnLate

__all__ = ["GuardCounts", "Guards", "OnLate"]
