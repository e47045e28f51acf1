"""A bundle behind a websocket: `vqbet-serve` and its client, `RemotePolicy`."""

from vqbet_serve.client import RemotePolicy

__all__ = ["RemotePolicy"]
