"""The control loop: newest observation, policy, command, at a fixed rate."""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import DeadlineError, EdgePolicy, ObservationError
from vqbet_edge_ros.anchor import Anchor
from vqbet_edge_ros.diagnostics import Statistics
from vqbet_edge_ros.inputs import Inputs, Observed, Refusal
from vqbet_edge_ros.watchdog import Ticket, Watchdog

# How often a simulation's clock is looked at.
_LOOK_S = 0.001


class Step(NamedTuple):
    """A command that was sent: observation, action (A,), and whether a chunk was predicted."""

    observation: dict[str, Any]
    action: NDArray[np.float32]
    decided: bool


class Controller:
    """One step of the loop.

    Args:
        anchor: where an episode's first action starts from.
        sent: is told of every command, after it was sent.
    """

    def __init__(
        self,
        policy: EdgePolicy,
        inputs: Inputs,
        watchdog: Watchdog,
        statistics: Statistics,
        anchor: Anchor,
        sent: Callable[[Step], None],
    ) -> None:
        self._policy, self._inputs, self._watchdog = policy, inputs, watchdog
        self._statistics, self._anchor, self._sent = statistics, anchor, sent

    def tick(self) -> None:
        """Act if there is something to act on.

        Raises:
            Exception: the policy failed; it is of no use any more.
        """
        if not self._watchdog.asks_policy():
            return
        now = time.monotonic()
        match self._inputs.observe(now):
            case Refusal() as refusal:
                self._refuse(refusal)
            case observed:
                ticket = self._watchdog.admit(now)
                if ticket is not None:
                    self._act(observed, ticket)

    def _refuse(self, refusal: Refusal) -> None:
        self._statistics.count(refusal.cause)
        self._watchdog.refuse(refusal, time.monotonic())

    def _act(self, observed: Observed, ticket: Ticket) -> None:
        start, before = time.monotonic(), self._policy.last
        try:
            if ticket.reset:
                state = observed.values[self._policy.manifest.state_key]
                self._policy.reset(from_action=self._anchor(state, ticket.last))
            action = self._policy.act(observed.values, observed.newest)
        except ObservationError as error:
            self._refuse(Refusal("invalid", str(error)))
            return
        except DeadlineError as error:
            self._refuse(Refusal("late", str(error)))
            return
        upcoming = self._policy.upcoming
        now = time.monotonic()
        if upcoming is None or not self._watchdog.command(ticket, action, upcoming, now):
            self._statistics.count("overtaken")
            return
        for topic in observed.repeated:
            self._statistics.count(f"again {topic}")
        self._statistics.acted(now - start, now - observed.oldest, now)
        self._sent(Step(observed.values, action, self._policy.last is not before))


class Loop:
    """Calls `tick` at a rate, on a thread of its own, until it fails or is stopped.

    Args:
        tick: what is done at every step.
        rate: in steps per second.
        simulated: seconds of a simulation's clock, which goes faster, slower or not at all; None
            keeps to `time.monotonic()`.
    """

    def __init__(
        self, tick: Callable[[], None], rate: float, simulated: Callable[[], float] | None = None
    ) -> None:
        self._tick, self._period = tick, 1 / rate
        self._now = simulated or time.monotonic
        # Nobody can wait for a simulation but by looking.
        self._longest = float("inf") if simulated is None else _LOOK_S
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vqbet-control", daemon=True)
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """End after the step under way; says whether it ended in time."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        due = self._now()
        while not self._ended.wait(min(max(0.0, due - self._now()), self._longest)):
            # A simulation that begins anew is behind all that was due.
            due = min(due, self._now() + self._period)
            if self._now() < due:
                continue
            try:
                self._tick()
            except Exception as error:  # noqa: BLE001 - whatever it is, the node has to say it
                self.failure = error
                return
            # Steps that were missed are not made up for: two commands at once are worse.
            due = max(due + self._period, self._now())
