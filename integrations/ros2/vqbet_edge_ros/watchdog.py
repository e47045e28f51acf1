"""Who may move the robot: the policy, an operator, or nobody."""

import enum
import logging
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import ObservationError
from vqbet_edge_ros.inputs import Refusal
from vqbet_edge_ros.joints import Values
from vqbet_edge_ros.outputs import Outputs

_LOG = logging.getLogger(__name__)


class Mode(enum.Enum):
    """Who may move the robot.

    CLOSED: nobody, the node is not active. STARTING: the policy, if there is an observation soon.
    RUNNING: the policy. STOPPED: the policy again, if there is an observation soon. WAITING: nobody
    until somebody calls `~/enable`, and nothing is sent. TELEOP: an operator.
    """

    CLOSED = "closed"
    STARTING = "waiting for the first observation"
    RUNNING = "running"
    STOPPED = "stopped"
    WAITING = "stopped until ~/enable is called"
    TELEOP = "teleoperated"


@dataclass(frozen=True)
class Ticket:
    """The right to send one command.

    Attributes:
        generation: void once the watchdog has another.
        reset: whether a new episode begins with it.
        last: the latest command (J,) in ROS's units that was sent and not forgotten since.
    """

    generation: int
    reset: bool
    last: Values | None = None


class Watchdog:
    """Lets commands through, or does not.

    Used by the control thread, by ROS's callbacks and by the thread that handles signals: after a
    stop has returned, no command of an earlier ticket is sent.

    Args:
        output: where commands go.
        timeout: seconds without a command until the robot is stopped.
        resume_within: seconds after which the policy does not begin or go on by itself: since the
            last command, or since it was armed, where an observation has `timeout` at least.
        teleop_timeout: seconds after an operator's last command until that is the end of it.
        teleop_resumes: whether that arms the policy.

    Attributes:
        mode: who may move the robot now.
        reason: why the policy may not.
    """

    def __init__(
        self,
        output: Outputs,
        *,
        timeout: float,
        resume_within: float,
        teleop_timeout: float,
        teleop_resumes: bool = False,
    ) -> None:
        self._output, self._width = output, output.width
        self._timeout, self._resume_within = timeout, resume_within
        self._teleop_timeout, self._teleop_resumes = teleop_timeout, teleop_resumes
        self._lock = threading.Lock()
        self.mode, self.reason = Mode.CLOSED, ""
        self._generation = 0
        self._reset = self._quiet = False
        # Monotonic times: the latest command, or arming if that was later; the latest sign that the
        # policy is at work; the operator's latest command.
        self._armed = self._alive = self._teleoperated = 0.0
        self._after_teleop = Mode.WAITING

    def open(self, now: float) -> None:
        """The node is active: the policy may begin an episode."""
        with self._lock:
            self._output.clear()
            self._arm(now)

    def close(self, reason: str) -> None:
        """Nothing moves the robot from here on; what keeps it where it is is sent a last time."""
        with self._lock:
            if self.mode is not Mode.CLOSED:
                self._halt(Mode.CLOSED, reason)

    def enable(self, enabled: bool, now: float) -> bool:
        """Let the policy move the robot, in a new episode, or not; says whether it is so now."""
        with self._lock:
            match self.mode:
                case Mode.CLOSED:
                    return False
                case Mode.TELEOP:
                    # What was said before an operator has moved the robot does not start it after.
                    self._after_teleop = Mode.WAITING
                    return not enabled
                case Mode.RUNNING if enabled:
                    pass
                case _ if enabled:
                    self._arm(now)
                case _:
                    self._halt(Mode.WAITING, "disabled by ~/enable")
            return True

    def request_reset(self) -> bool:
        """Begin a new episode with the next observation; says whether there will be one."""
        with self._lock:
            self._reset = True
            return self.mode is not Mode.CLOSED

    def teleoperate(self, values: Values, now: float) -> None:
        """An operator's command (J,): it takes over, and is sent.

        Raises:
            ObservationError: it does not fit; nothing is sent.
        """
        if values.shape != (self._width,) or not np.isfinite(values).all():
            raise ObservationError(
                f"expected {self._width} finite numbers of the operator, got {values.tolist()}"
            )
        with self._lock:
            if self.mode is Mode.CLOSED:
                return
            if self.mode is not Mode.TELEOP:
                resumes = self._teleop_resumes and self.mode is not Mode.WAITING
                self._after_teleop = Mode.STARTING if resumes else Mode.WAITING
                self._enter(Mode.TELEOP, "an operator has taken over")
            self._teleoperated = now
            self._output.forward(values)

    def asks_policy(self) -> bool:
        """Whether an observation is wanted."""
        return self.mode in {Mode.STARTING, Mode.RUNNING, Mode.STOPPED}

    def refuse(self, refusal: Refusal, now: float) -> None:
        """There is no observation."""
        with self._lock:
            match self.mode:
                case Mode.RUNNING | Mode.STARTING | Mode.STOPPED if refusal.cause == "conflict":
                    self._halt(Mode.WAITING, refusal.reason, alone=False)
                case Mode.RUNNING if refusal.stops or now - self._alive > self._timeout:
                    self._halt(Mode.STOPPED, refusal.reason)
                case Mode.STARTING | Mode.STOPPED:
                    self.reason, self._quiet = refusal.reason, False

    def admit(self, now: float) -> Ticket | None:
        """There is an observation: whether the policy may act on it."""
        with self._lock:
            self._gives_up(now)
            if self.mode in {Mode.STARTING, Mode.STOPPED}:
                self._alive = now
                self._enter(Mode.RUNNING, "")
            if self.mode is not Mode.RUNNING:
                return None
            ticket = Ticket(self._generation, self._reset, self._output.last)
            self._reset = False
            return ticket

    def command(
        self,
        ticket: Ticket,
        action: NDArray[np.float32],
        upcoming: NDArray[np.float32],
        now: float,
    ) -> bool:
        """Send an action (A,) of the chunk (n, A), unless the robot was stopped meanwhile."""
        with self._lock:
            if ticket.generation != self._generation:
                self._reset |= ticket.reset
                return False
            self._output.command(action, upcoming)
            self._armed = self._alive = now
            return True

    def watch(self, now: float) -> None:
        """To be called at the control rate, by another thread than the one that acts."""
        with self._lock:
            match self.mode:
                case Mode.RUNNING if now - self._alive > self._timeout:
                    late = f"no command for {now - self._alive:.3f} s: the policy is late"
                    self._halt(Mode.STOPPED, late)
                case Mode.STARTING | Mode.STOPPED:
                    if not self._gives_up(now) and not self._quiet:
                        self._output.stand()
                case Mode.TELEOP if now - self._teleoperated > self._teleop_timeout:
                    self._armed = now
                    self._halt(self._after_teleop, "the operator has given back")

    def _arm(self, now: float) -> None:
        self._armed = now
        self._enter(Mode.STARTING, "")

    def _enter(self, mode: Mode, reason: str) -> None:
        """Every change of mode voids tickets, and what follows is another episode."""
        if reason and mode is not self.mode:
            _LOG.warning("%s: %s", mode.value, reason)
        self.mode, self.reason = mode, reason
        self._generation += 1
        self._reset = True
        self._quiet = mode is Mode.STARTING  # until it is known what hinders
        if mode is Mode.WAITING:
            self._output.clear()

    def _halt(self, mode: Mode, reason: str, *, alone: bool = True) -> None:
        """Send what keeps the robot where it is, unless others may be moving it by now."""
        try:
            if self.mode is not Mode.WAITING and not self._quiet:
                if mode in {Mode.WAITING, Mode.CLOSED}:
                    self._output.end(alone=alone)
                else:
                    self._output.stand()
        finally:
            self._enter(mode, reason)

    def _gives_up(self, now: float) -> bool:
        """Whether it has just become too long ago that somebody meant the robot to move."""
        match self.mode:
            case Mode.STOPPED:
                allowed = self._resume_within
            case Mode.STARTING:
                allowed = max(self._resume_within, self._timeout)
            case _:
                return False
        if now - self._armed <= allowed:
            return False
        self._halt(Mode.WAITING, self.reason or f"no observation came within {allowed} s")
        return True
