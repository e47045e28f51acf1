"""What stands between a network and a moving arm; `Guards` says how."""

from vqbet_edge.guards.actions import GuardCounts
from vqbet_edge.guards.config import Guards, OnLate

__all__ = ["GuardCounts", "Guards", "OnLate"]
