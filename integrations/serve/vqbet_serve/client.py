"""`RemotePolicy`: `EdgePolicy`'s methods, answered by a server."""

import math
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqbet_edge.errors import (
    BackendError,
    ConcurrentUseError,
    DeadlineError,
    HistoryError,
    NonFiniteError,
    ObservationError,
    UsageError,
    VQBeTEdgeError,
)
from vqbet_edge.runtime.arguments import checked_action
from vqbet_edge.runtime.guards.actions import ActionGuard, GuardCounts
from vqbet_edge.runtime.guards.clock import ObservationClock
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.observation import Observation, feature_array, resize_hint
from vqbet_edge.runtime.worker import Job  # noqa: TC001 - annotations of locals too
from vqbet_serve.frames import RESET_DONE, array, pack, unpack
from vqbet_serve.link import Link
from vqbet_serve.metadata import PolicyMetadata

Floats = NDArray[np.float32]
_BAD_OBSERVATION = "ObservationError: "


class RemotePolicy:
    """A policy on another computer, with its guards on the robot.

    An observation that comes while the server still works on an earlier one is dropped, never
    queued: the robot acts on what it sees now. When an answer is late, `guards.on_late` decides, on
    the robot; after as many late calls in a row as a chunk has actions, the connection counts as
    lost. When it is lost, so is the history: `HistoryError`, until `reset`.

    Args:
        url: such as ws://192.168.1.20:8000, or wss://.
        guards: as of `EdgePolicy`; `deadline_s` and `on_late` are required, and `continue` is not
            available, for chunks stay on the server. `action_limits="data"` is the server's part:
            the robot does not know that range. Other limits hold on the robot too.
        api_key: the server's.
        session_id: gives this robot a random sequence of its own.
        tls: whom to trust, for wss://; None trusts whom the system trusts.
        connect_s: seconds that connecting, and `reset`, may take.

    Attributes:
        dropped: observations that were not sent, for the server still worked on an earlier one.

    Raises:
        UsageError: the guards lack a deadline, or do not fit the policy.
        BackendError: the server cannot be reached or refuses the key.
    """

    def __init__(
        self,
        url: str,
        *,
        guards: Guards,
        api_key: str | None = None,
        session_id: str | None = None,
        tls: ssl.SSLContext | None = None,
        connect_s: float = 5.0,
    ) -> None:
        if guards.deadline_s is None or guards.on_late == "continue":
            raise UsageError(
                "a network can always be late: pass guards=Guards(deadline_s=0.05, "
                "on_late='raise') or 'hold'"
            )
        self._guards, self._deadline_s, self._connect_s = guards, guards.deadline_s, connect_s
        self._url, self._api_key, self._tls = url, api_key, tls
        self._name = {} if session_id is None else {"session_id": session_id}
        self._clock = ObservationClock(guards.max_age_s)
        self._lock = threading.Lock()
        self._job: Job[bytes | str] | None = None
        self._handed: Floats | None = None
        self._late = self.dropped = self._unanswered = 0
        self._link = Link(url, api_key, tls, connect_s)
        dim = self.metadata.action_dim
        try:
            # Nothing is known here of the data's range: "data" limits nothing.
            self._actions = ActionGuard(guards, None, dim)
        except UsageError:
            self._link.close()
            raise

    @property
    def metadata(self) -> PolicyMetadata:
        """What the server says of its policy."""
        return self._link.metadata

    @property
    def fps(self) -> float | None:
        """Observations per second that the policy was trained with; None where not known."""
        return self.metadata.fps

    @property
    def guard_counts(self) -> GuardCounts:
        """How often the guards on the robot stepped in."""
        return GuardCounts(self._actions.clamped, self._actions.slowed, self._late)

    def act(self, observation: Observation, observation_time: float | None = None) -> Floats:
        """The action (A,) for this observation, within `guards.deadline_s` or not at all.

        Args:
            observation: as for `EdgePolicy.act`.
            observation_time: as for `EdgePolicy.act`.

        Raises:
            ObservationError: the observation does not fit, or the one whose answer was late; it is
                not in the history.
            StaleObservationError: its time does not; likewise.
            DeadlineError: the answer is late, and nothing stands for it.
            HistoryError: the connection is lost, and the history with it; call `reset`.
            ConcurrentUseError: another call on this object is running.
        """
        end = time.monotonic() + self._deadline_s
        with self._exclusive():
            if self._link.failure is not None:
                raise self._link.lost()
            self._clock.check(observation_time)
            frame = self._request(observation)
            if not self._is_answered(end):
                # A window with longer gaps shows nothing, and what is held grows old.
                if self._unanswered >= self.metadata.action_chunk_size:
                    raise self._link.lose(f"no answer to {self._unanswered} calls")
                self.dropped += 1
                return self._on_late()
            self._take()  # what is late is of no use, but may be an error
            self._job = self._link.ask(frame)
            self._clock.accept(observation_time)
            if not self._is_answered(end):
                return self._on_late()
            action = self._take()
            assert action is not None  # noqa: S101 - for the type checker
            self._unanswered = 0
            self._actions.clamp(action)
            self._handed = self._actions.limit_change(action)
            return self._handed.copy()

    def reset(self, seed: int | None = None, *, from_action: ArrayLike | None = None) -> None:
        """Forget the history, on a new connection if the old one is lost or still busy.

        Args:
            seed: a new start of the random sequence; None lets it run on. On a new connection it
                starts anew in any case.
            from_action: as of `EdgePolicy.reset`; after a lost connection, the last action that
                the robot was sent.

        Raises:
            BackendError: the server cannot be reached, does not answer or refuses.
            UsageError: an argument is out of range; nothing is forgotten.
        """
        with self._exclusive():
            dim = self.metadata.action_dim
            before = None
            if from_action is not None:
                before = checked_action("from_action", from_action, dim)
            # Only a request shows whether a connection that stands still leads somewhere.
            usable = self._link.failure is None and self._is_answered(time.monotonic())
            self._job = self._handed = None
            self._unanswered = 0
            self._clock.clear()
            self._actions.clear(before)
            if usable and self._restarted(seed):
                return
            self._link.close()
            self._reconnect()
            if not self._restarted(seed):
                raise BackendError(f"'{self._url}' does not reset: {self._link.failure}")

    def close(self) -> None:
        """End the session; nothing acts afterwards. Also at the end of a `with` block."""
        self._link.close()

    def __enter__(self) -> "RemotePolicy":  # noqa: PYI034 - Self needs Python 3.11
        """The policy itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _reconnect(self) -> None:
        link = Link(self._url, self._api_key, self._tls, self._connect_s)
        now, before = link.metadata, self.metadata
        if (now.observation, now.action_dim) != (before.observation, before.action_dim):
            link.close()
            raise BackendError(f"'{self._url}' now serves a policy for another robot")
        self._link = link

    def _restarted(self, seed: int | None) -> bool:
        """Whether the server has begun a new episode; the connection is lost otherwise."""
        start = {} if seed is None else {"seed": seed}
        try:
            job = self._link.ask(pack({"endpoint": "reset", **start, **self._name}))
            if not job.done(self._connect_s):
                raise self._link.lose(f"no answer to reset within {self._connect_s} s")
            answer = job.result()
        except HistoryError:
            return False
        if answer != RESET_DONE:
            self._link.lose(str(answer))
        return answer == RESET_DONE

    def _request(self, observation: Observation) -> bytes:
        """Packed here, for the caller may write the next frame into the same array."""
        arrays: dict[str, Any] = {}
        expected = self.metadata.observation
        for key, feature in expected.items():
            value = feature_array(observation, key, list(expected))
            if value.size != math.prod(feature.shape):
                raise ObservationError(
                    f"'{key}': expected {feature.dtype} {feature.shape}, got {value.dtype} "
                    f"{value.shape}{resize_hint(value.shape, feature.shape)}"
                )
            arrays[key] = value
        return pack(arrays | self._name)

    def _is_answered(self, end: float) -> bool:
        return self._job is None or self._job.done(max(0.0, end - time.monotonic()))

    def _take(self) -> Floats | None:
        """The action (A,) in the answer, None where nothing was asked."""
        job, self._job = self._job, None
        if job is None:
            return None
        answer = job.result()
        if isinstance(answer, str):
            if answer.startswith(_BAD_OBSERVATION):
                raise ObservationError(answer.removeprefix(_BAD_OBSERVATION))
            raise self._link.lose(answer)
        try:
            return self._action(answer)
        except VQBeTEdgeError as error:
            raise self._link.lose(str(error)) from error

    def _action(self, answer: bytes) -> Floats:
        message = unpack(answer)
        if "actions" not in message:
            raise UsageError("the answer has no actions")
        actions = array("actions", message["actions"])
        if actions.shape != (1, self.metadata.action_dim) or actions.dtype != np.float32:
            raise UsageError(f"expected one action as float32, got {actions.dtype} {actions.shape}")
        if not np.isfinite(actions).all():
            raise NonFiniteError("an action is not finite")
        action: Floats = actions[0].copy()
        return action

    def _on_late(self) -> Floats:
        self._late += 1
        self._unanswered += 1
        if self._guards.on_late == "hold" and self._handed is not None:
            return self._handed.copy()
        raise DeadlineError(
            f"no answer from '{self._url}' within {self._deadline_s} s; stop the robot, allow more "
            "time, or choose what to return then with Guards(on_late='hold')"
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(
                "another call on this policy is still running; use one RemotePolicy per thread"
            )
        try:
            yield
        finally:
            self._lock.release()
