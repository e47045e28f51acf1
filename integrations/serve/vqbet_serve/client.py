"""`RemotePolicy`: `EdgePolicy`'s methods, answered by a server."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from vqbet_edge.errors import (
    BackendError,
    DeadlineError,
    HistoryError,
    ObservationError,
    UsageError,
    VQBeTEdgeError,
)
from vqbet_edge.runtime.guards.actions import ActionGuard
from vqbet_edge.runtime.guards.clock import ObservationClock
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.observation import Observation
from vqbet_edge.runtime.worker import Job, Worker
from vqbet_serve.frames import FrameError, array, pack, unpack

Floats = NDArray[np.float32]


class RemotePolicy:
    """A policy on another computer, with its guards on the robot.

    An observation that comes while the server still works on an earlier one is dropped, never
    queued: the robot acts on what it sees now. When an answer is late, `guards.on_late` decides, on
    the robot. When the connection is lost, so is the history: `HistoryError`, until `reset`.

    Args:
        url: such as ws://192.168.1.20:8000, or wss://.
        api_key: the server's.
        session_id: keeps this robot's random sequence apart from others'.
        guards: as of `EdgePolicy`; `deadline_s` and `on_late` are required, and `continue` is not
            available, for chunks stay on the server. `action_limits="data"` is the server's part.
        connect_s: seconds that connecting may take.

    Raises:
        UsageError: the guards lack a deadline.
        BackendError: the server cannot be reached or refuses the key.
    """

    def __init__(
        self,
        url: str,
        *,
        guards: Guards,
        api_key: str | None = None,
        session_id: str | None = None,
        connect_s: float = 5.0,
    ) -> None:
        if guards.deadline_s is None or guards.on_late == "continue":
            raise UsageError(
                "a network can always be late: pass guards=Guards(deadline_s=0.05, "
                "on_late='raise') or 'hold'"
            )
        self._url, self._key, self._session = url, api_key, session_id
        self._guards, self._deadline_s, self._connect_s = guards, guards.deadline_s, connect_s
        self._clock = ObservationClock(guards.max_age_s)
        self._worker = Worker("vqbet-remote", finish=False)
        self._job: Job[Floats] | None = None
        self._handed: Floats | None = None
        self._lost = False
        self.late = self.dropped = 0
        self._open()

    def act(self, observation: Observation, observation_time: float | None = None) -> Floats:
        """The action (A,) for this observation, within `guards.deadline_s` or not at all.

        Raises:
            ObservationError: the observation does not fit; the history is as before.
            StaleObservationError: its time does not; likewise.
            DeadlineError: the answer is late, and nothing stands for it.
            HistoryError: the connection was lost, and the history with it; call `reset`.
        """
        end = time.monotonic() + self._deadline_s
        self._check_history()
        self._clock.check(observation_time)
        if self._job is not None and not self._finished(self._job, end):
            self.dropped += 1
            return self._on_late()
        self._job = self._worker.submit(lambda: self._ask(self._request(observation)))
        self._clock.accept(observation_time)
        if not self._finished(self._job, end):
            return self._on_late()
        job, self._job = self._job, None
        action = self._actions.handed_out(job.result())
        self._handed = action
        return action.copy()

    def reset(self) -> None:
        """Forget the history, on a new connection if the old one is lost.

        Raises:
            DeadlineError: the server still works on a call that was late.
            BackendError: the server cannot be reached.
        """
        if self._job is not None and not self._job.done():
            raise DeadlineError("the server still works on a call that was late; wait for it")
        if self._lost:
            self._connection.close()
            self._open()
        self._job = self._handed = None
        self._clock.clear()
        self._actions.clear()
        answer = self._exchange(pack({"endpoint": "reset", **self._name()}))
        if answer != "reset successful":
            raise BackendError(f"the server did not reset: {answer!r}")

    def close(self) -> None:
        """End the session."""
        self._connection.close()

    def _open(self) -> None:
        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else None
        try:
            self._connection: ClientConnection = connect(
                self._url,
                compression=None,
                additional_headers=headers,
                open_timeout=self._connect_s,
                max_size=1 << 20,
            )
            self.metadata = unpack(self._received(self._connect_s))
        except (OSError, WebSocketException, FrameError) as error:
            raise BackendError(f"'{self._url}' cannot be used: {error}") from error
        self._lost = False
        limits = Guards(
            action_limits=None if self._guards.action_limits == "data" else self._guards.action_limits,
            max_change=self._guards.max_change,
        )
        self._actions = ActionGuard(limits, None, int(self.metadata["action_dim"]))

    def _check_history(self) -> None:
        if self._lost:
            raise HistoryError(
                "the connection was lost, and with it the history; stop the robot and call reset()"
            )

    def _finished(self, job: Job[Floats], end: float) -> bool:
        return job.done(max(0.0, end - time.monotonic()))

    def _on_late(self) -> Floats:
        self.late += 1
        if self._guards.on_late == "hold" and self._handed is not None:
            return self._handed.copy()
        raise DeadlineError(
            f"no answer from '{self._url}' within {self._deadline_s} s; stop the robot, allow more "
            "time, or choose what to return then with Guards(on_late='hold')"
        )

    def _request(self, observation: Observation) -> bytes:
        keys = self.metadata["observation"]
        return pack({k: np.asarray(observation[k]) for k in keys if k in observation} | self._name())

    def _name(self) -> dict[str, Any]:
        return {} if self._session is None else {"session_id": self._session}

    def _ask(self, frame: bytes) -> Floats:
        answer = self._exchange(frame)
        if isinstance(answer, str):
            raise ObservationError(answer)
        actions = array("actions", unpack(answer).get("actions"))
        if actions.shape != (1, int(self.metadata["action_dim"])) or not np.isfinite(actions).all():
            raise FrameError(f"expected one finite action, got {actions.shape}")
        action: Floats = actions[0].astype(np.float32)
        return action

    def _exchange(self, frame: bytes) -> bytes | str:
        try:
            self._connection.send(frame)
            return self._connection.recv()
        except (OSError, WebSocketException) as error:
            self._lost = True
            raise HistoryError(
                f"the connection to '{self._url}' was lost ({error}); stop the robot and call reset()"
            ) from error

    def _received(self, seconds: float) -> bytes:
        frame = self._connection.recv(timeout=seconds)
        if isinstance(frame, str):
            raise FrameError(frame)
        return frame


__all__ = ["RemotePolicy", "VQBeTEdgeError"]
