"""One robot's policy per session, on shared weights."""

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeAlias

from numpy.typing import NDArray

from vqbet_edge import EdgePolicy, ObservationError, UsageError
from vqbet_serve.frames import Message, array
from vqbet_serve.recordings import Recordings

# How many of a request's keys are named where one is missing.
_SHOWN = 16
#: Made around every step that is computed.
Step: TypeAlias = Callable[[], AbstractContextManager[object]]


class Session:
    """A robot's policy. Its methods compute, and are called one at a time.

    Attributes:
        name: the session's id, None for a connection's session without one.
        used: when it was last asked, in seconds of `time.monotonic()`.
    """

    def __init__(self, sessions: "Sessions", name: str | None) -> None:
        self._sessions, self.name = sessions, name
        self.used = time.monotonic()
        self._begin(None)

    def _begin(self, seed: int | None) -> None:
        self._made_of = self._sessions.policy
        start = self._sessions.start(self.name) if seed is None else seed
        self._policy = self._made_of.sibling(seed=start)
        self._recording = ExitStack()
        if self._sessions.recordings is not None:
            self._recording.enter_context(self._sessions.recordings.recording(self._policy))

    def act(self, request: Message) -> NDArray[Any]:
        """The action (A,) for a request's observation.

        Raises:
            ObservationError: the observation does not fit; the history is as before.
            VQBeTEdgeError: the policy cannot act.
        """
        self.used = time.monotonic()
        manifest = self._policy.manifest
        keys = tuple(manifest.observation_shapes)
        if missing := [key for key in keys if key not in request]:
            came = [ascii(key)[1:-1][:40] for key in sorted(request)[:_SHOWN]]
            raise ObservationError(f"'{missing[0]}' is missing: expected {list(keys)}, got {came}")
        seen = {key: array(key, request[key]) for key in keys}
        with self._sessions.step():
            return self._policy.act(seen)

    def reset(self, seed: int | None) -> None:
        """A new episode, as by `EdgePolicy.reset`; with the newest policy, from the start."""
        self.used = time.monotonic()
        if self._made_of is self._sessions.policy:
            self._policy.reset(seed=seed)
            return
        before, recording = self._policy, self._recording
        self._begin(seed)
        recording.close()
        before.close()

    def close(self) -> None:
        """Free the robot's memory."""
        self._recording.close()
        self._policy.close()


class Sessions:
    """All robots of a server. Its methods may be called from any thread.

    Attributes:
        policy: whose siblings the robots get. It may be exchanged for one with the same
            observations and actions; robots then take the new one at their next `reset`.
        step: see `Step`.
        recordings: of every session; None: nothing is recorded.

    Args:
        policy: the first.
        seed: where the random sequence of a session without an id starts.
        most: robots at the same time.
        step: see `Step`.
        recordings: likewise.
    """

    def __init__(
        self,
        policy: EdgePolicy,
        seed: int,
        most: int,
        step: Step = nullcontext,
        recordings: Recordings | None = None,
    ) -> None:
        self.policy, self.step, self.recordings = policy, step, recordings
        self._seed, self._most = seed, most
        self._names: list[str | None] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def has_room(self, name: str | None) -> bool:
        """Whether `open` would find a place."""
        return len(self._names) < self._most and (name is None or name not in self._names)

    def open(self, name: str | None) -> Session:
        """A session, named by the client or not; takes as long as making a policy's buffers.

        Raises:
            UsageError: there are as many robots as allowed, or one with this name.
        """
        with self._lock:
            if len(self._names) >= self._most:
                raise UsageError(
                    f"this server drives {self._most} robots already; end a session, or start it "
                    "with a larger --max-robots"
                )
            if not self.has_room(name):
                raise UsageError(
                    "this session_id is in use by another connection; end that one, or give every "
                    "robot an id of its own"
                )
            self._names.append(name)
        try:
            return Session(self, name)
        except BaseException:
            self._give_back(name)
            raise

    def close(self, session: Session) -> None:
        """End a session and give its place back."""
        try:
            session.close()
        finally:
            self._give_back(session.name)

    def _give_back(self, name: str | None) -> None:
        with self._lock:
            self._names.remove(name)

    def start(self, name: str | None) -> int:
        """Where the random sequence of a session starts."""
        return self._seed if name is None else derived_seed(self._seed, name)


def derived_seed(seed: int, name: str) -> int:
    """The seed of a session with an id.

    The first 8 bytes, little-endian, of the SHA-256 of "SEED/NAME", without the lowest bit.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
