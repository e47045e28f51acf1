"""One robot's policy per session, on shared weights."""

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from vqbet_edge import EdgePolicy, UsageError
from vqbet_edge.runtime.manifest import Manifest
from vqbet_serve.frames import array

MAX_ID_LENGTH = 256


@dataclass
class Session:
    """A robot's policy and when it was last asked, in seconds of `time.monotonic()`."""

    policy: EdgePolicy
    used: float = field(default_factory=time.monotonic)

    def act(self, request: Mapping[str, Any]) -> NDArray[Any]:
        """The action (A,) for a request's observation.

        Raises:
            ObservationError: the observation does not fit; the history is as before.
            VQBeTEdgeError: the policy cannot act.
        """
        self.used = time.monotonic()
        manifest = self.policy.manifest
        keys = (*manifest.image_keys, manifest.state_key)
        return self.policy.act({key: array(key, request[key]) for key in keys if key in request})

    def reset(self, seed: int | None) -> None:
        """A new episode."""
        self.used = time.monotonic()
        self.policy.reset(seed=seed)


class Sessions:
    """All robots of a server. Its methods may be called from any thread.

    Args:
        policy: whose siblings the robots get.
        seed: where the random sequence of a session without an id starts.
        most: robots at the same time.
    """

    def __init__(self, policy: EdgePolicy, seed: int, most: int) -> None:
        self._policy, self._seed, self._most = policy, seed, most
        self._open: set[str] = set()
        self._unnamed = 0
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is served."""
        return self._policy.manifest

    def __len__(self) -> int:
        return len(self._open) + self._unnamed

    def open(self, name: str | None) -> Session:
        """A session, named by the client or not.

        Raises:
            UsageError: there are as many robots as allowed, or one with this name.
        """
        with self._lock:
            if len(self) >= self._most:
                raise UsageError(
                    f"this server drives {self._most} robots already; end a session, or start it "
                    "with a larger --max-robots"
                )
            if name is not None and name in self._open:
                raise UsageError(f"the session '{name}' is in use by another connection")
            policy = self._policy.sibling(seed=self.seed(name))
            if name is None:
                self._unnamed += 1
            else:
                self._open.add(name)
        return Session(policy)

    def close(self, name: str | None) -> None:
        """Give a session's place back."""
        with self._lock:
            if name is None:
                self._unnamed -= 1
            else:
                self._open.discard(name)

    def seed(self, name: str | None) -> int:
        """Where a session's random sequence starts: with an id, at a number derived from it."""
        if name is None:
            return self._seed
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1
