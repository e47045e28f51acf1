"""From observations to actions on a loaded backend, as `EdgePolicy` and a bundle's proof act."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike

from vqbet_edge.errors import ConcurrentUseError, DeadlineError, ForkError, HistoryError
from vqbet_edge.runtime.arguments import (
    checked_action,
    checked_codes,
    checked_prefetch,
    checked_replan,
    checked_seed,
    checked_temperature,
)
from vqbet_edge.runtime.backends.base import Backend, Floats, Prefetch
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.ending import computing
from vqbet_edge.runtime.guards.actions import ActionGuard, Step
from vqbet_edge.runtime.guards.clock import ObservationClock
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.deadline import Deadline
from vqbet_edge.runtime.guards.states import StateGuard
from vqbet_edge.runtime.manifest import STATE_RANGE
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.observation import Observation, ObservationReader
from vqbet_edge.runtime.planning import Planner, action_scaling, decode_table, secondary_columns
from vqbet_edge.runtime.recording import Recorder  # noqa: TC001 - annotations of attributes
from vqbet_edge.runtime.recording_format import Outcome
from vqbet_edge.runtime.sampling import Codes, CodeSampler, Decision
from vqbet_edge.runtime.window import ObservationWindow, Slot
from vqbet_edge.runtime.worker import Backlog, Worker

# What is computed ahead takes a fraction of a second; a backend that hangs, for ever.
_PATIENCE_S = 5.0


class ActingPolicy:
    """One robot's history, queue and guards on a backend; see `EdgePolicy.load` for the options."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        seed: int = 0,
        temperature: float | None = None,
        replan_every: int | None = None,
        prefetch: Prefetch | None = None,
        guards: Guards | None = None,
    ) -> None:
        manifest, policy = bundle.manifest, bundle.manifest.policy
        # The graphs' bytes are as large as the weights, and the backend has those.
        self._bundle, self._manifest, self._backend = bundle.without_graphs(), manifest, backend
        self._replan_every = checked_replan(replan_every, policy.action_chunk_size)
        trained = policy.bet_softmax_temperature
        self._temperature = trained if temperature is None else checked_temperature(temperature)
        scaling, self._guards = action_scaling(bundle), guards or Guards()
        self._actions = ActionGuard(self._guards, scaling.limits, manifest.action_dim)
        demonstrated = bundle.demonstrated(STATE_RANGE, manifest.state_dim)
        self._states = StateGuard(
            self._guards, demonstrated, manifest.state_key, manifest.state_dim
        )
        state = Affine.from_arrays(bundle.arrays, "state", manifest.state_dim)
        self._reader = ObservationReader(manifest, state, self._states)
        self._clock = ObservationClock(self._guards.max_age_s)
        waiting, most = self._replan_every, policy.action_chunk_size
        self._deadline: Deadline[Step] | None = None
        if self._guards.deadline_s is not None:
            self._deadline, waiting = Deadline(self._guards.deadline_s, most), waiting + most
        self._window = ObservationWindow(manifest, backend.create_window(), waiting)
        self._seed = checked_seed(seed)
        sampler = CodeSampler(self._temperature, trained, secondary_columns(bundle), self._seed)
        table = decode_table(bundle)
        self._planner = Planner(self._window, sampler, table, scaling, self._actions)
        self._prefetch = checked_prefetch(prefetch or backend.default_prefetch)
        self._worker = Worker("vqbet-prefetch", finish=True)
        self._prefetching: Backlog[None] = Backlog()
        self._recorder: Recorder | None = None
        self._queue: deque[Step] = deque()
        self._last: Decision | None = None
        self._lock = threading.Lock()
        self._broken = False
        self._process = os.getpid()

    def close(self) -> None:
        """Free this robot's memory, and the weights with the last sibling; then nothing acts.

        A policy is also a context manager that closes at the end of its block.

        Raises:
            DeadlineError: the backend still works on an earlier call.
        """
        if self._window.graphs.closed:
            return
        with self._exclusive():
            self._await_backend()
            self._window.graphs.close()

    @property
    def last(self) -> Decision | None:
        """The latest decision, None before the first."""
        return self._last

    def reset(self, seed: int | None = None, *, from_action: ArrayLike | None = None) -> None:
        """Forget history and queued actions; call it at the start of every episode.

        Args:
            seed: a new start of the random sequence; None lets it run on.
            from_action: (A,), the robot's last command or where it stands, in the units of
                actions: `Guards(max_change=...)` then holds on the episode's first action too.
                None where that is not known: the first action is free.

        Raises:
            DeadlineError: the backend still works on an earlier call; nothing is forgotten.
            UsageError: an argument is out of range; likewise.
        """
        with self._exclusive():
            start = None if seed is None else checked_seed(seed)
            before = None
            if from_action is not None:
                before = checked_action("from_action", from_action, self._manifest.action_dim)
            self._await_backend()
            if start is not None:
                self._seed = start
                self._planner.sampler.reseed(start)
            if self._recorder is not None:
                self._recorder.begin_episode()
            self._actions.clear(before)
            self._states.clear()
            self._clock.clear()
            self._window.clear()
            self._queue.clear()
            self._last = None
            self._broken = False

    def drop_queue(self) -> None:
        """Forget queued actions but not the history: the next `act` predicts from what is seen.

        It waits for calls that were late. `reset` is for a new episode.
        """
        with self._exclusive():
            if self._deadline is None:
                self._queue.clear()
            else:
                self._deadline.finish(self._queue.clear)
            self._actions.leave_chunk()

    def act(self, observation: Observation, observation_time: float | None = None) -> Floats:
        """The action for this observation.

        The observation enters the history on every call; a new chunk is predicted only when the
        queue of actions is empty. `vqbet_edge.runtime.observation` draws what an observation looks
        like.

        Args:
            observation: what the robot sees and feels.
            observation_time: when it was taken, in seconds of `time.monotonic()`; None where that
                is not known. Too old, repeated or out of order, it is refused.

        Returns:
            float32 (action_dim,).

        Raises:
            ObservationError: the observation does not fit; the history is as before the call.
            StaleObservationError: its time does not; likewise.
            DeadlineError: the backend was too slow, and there is nothing else to return. The
                observation is in the history, and later calls go on from it.
            ForkError: the policy was loaded before this process was forked.
            NonFiniteError: the network produced NaN or infinity.
            HistoryError: an earlier call failed after its observation had entered the history.
            ConcurrentUseError: another call on this object is running.
        """
        start = time.monotonic()
        with self._exclusive():
            slot = self._read(observation, observation_time)
            if self._deadline is None:
                step: Step | None = self._step(slot)
            else:
                step = self._deadline.run(lambda: self._checked_step(slot), start)
            action = self._actions.instead() if step is None else self._actions.hand_out(step)
            if self._recorder is not None:
                outcome = Outcome.LATE if step is None else Outcome.ACTED
                self._recorder.acted(action, time.monotonic() - start, outcome)
            return action

    def act_chunk(
        self,
        observation: Observation,
        codes: Sequence[int] | Codes | None = None,
        observation_time: float | None = None,
    ) -> Floats:
        """Append the observation and predict a chunk at once; queued actions are dropped.

        A deadline does not hold here, and a limit on change takes the chunk as executed whole.

        Args:
            observation: as for `act`.
            codes: (primary, secondary) to force instead of drawing them.
            observation_time: as for `act`.

        Returns:
            float32 (action_chunk_size, action_dim).

        Raises:
            UsageError: a forced code is not in the codebook.
        """
        start = time.monotonic()
        with self._exclusive():
            forced = None if codes is None else checked_codes(codes, self._manifest)
            slot = self._read(observation, observation_time)

            def predict() -> Step:
                self._check_history()
                with self._history():
                    self._queue.clear()
                    chunk = self._plan(slot, forced)
                self._prepare_next()
                return Step(chunk, 0)

            first = predict() if self._deadline is None else self._deadline.finish(predict)
            steps = [first._replace(position=place) for place in range(len(first.chunk))]
            chunk = np.stack([self._actions.hand_out(step) for step in steps])
            if self._recorder is not None:
                self._recorder.acted(chunk[0], time.monotonic() - start, Outcome.CHUNK)
            return chunk

    def _read(self, observation: Observation, stamp: float | None) -> Slot:
        """Check an observation and keep it; only what fails after this breaks the history."""
        if self._deadline is None:
            self._check_history()
        else:  # otherwise checked where earlier calls may still be running
            self._deadline.admit()
        self._clock.check(stamp)
        slot = self._window.next_slot()
        self._reader.read(observation, slot.frames, slot.state)
        self._clock.accept(stamp)
        if self._recorder is not None:
            self._recorder.append(observation, stamp)
        return self._window.take_slot()

    def _check_history(self) -> None:
        if self._broken:
            raise HistoryError(
                "an earlier call failed after its observation had entered the history, so the "
                "window no longer shows what happened; stop the robot and call reset()"
            )
        try:
            self._prefetching.check()
        except BaseException:
            self._broken = True
            raise

    def _checked_step(self, slot: Slot) -> Step:
        self._check_history()
        return self._step(slot)

    def _step(self, slot: Slot) -> Step:
        """Take an observation into the history and the next action from the queue."""
        if self._queue:
            step = self._queue.popleft()
            self._append_queued(slot)
            return step
        with self._history():
            chunk = self._plan(slot, None)
            self._queue.extend(Step(chunk, position) for position in range(self._replan_every))
            step = self._queue.popleft()
        self._prepare_next()
        return step

    def _await_backend(self) -> None:
        """Wait for what is computed ahead, and forget what earlier calls left behind."""
        late = self._deadline is not None and self._deadline.busy
        if late or self._prefetching.running(_PATIENCE_S):
            raise DeadlineError(
                "the backend still works on an earlier call; wait for it, or load a new policy"
            )
        if self._deadline is not None:
            self._deadline.clear()
        self._prefetching.clear()

    @contextmanager
    def _history(self) -> Iterator[None]:
        """What fails in here leaves the window unusable."""
        self._broken = True
        yield
        self._broken = False

    def _append_queued(self, slot: Slot) -> None:
        """Take a queued step's observation into the window, now or while the robot moves."""
        left, ahead = len(self._queue), self._prefetch != "off"

        def work() -> None:
            self._window.append(slot)
            # Otherwise the frame will have left the window before the next prediction.
            if ahead and left + 1 < self._manifest.policy.n_obs_steps:
                self._window.encode_newest()
            if ahead and not left:
                self._window.prefill()

        if self._prefetch == "thread":
            self._prefetching.add(self._worker.submit(work))
        else:
            with self._history():
                work()

    def _prepare_next(self) -> None:
        """After a prediction: if the next call predicts too, get ready for it."""
        if self._prefetch == "thread" and not self._queue:
            self._prefetching.add(self._worker.submit(self._window.prefill))

    def _plan(self, slot: Slot, forced: Codes | None) -> Floats:
        """Take the newest observation and predict: a chunk (W, A)."""
        self._prefetching.wait()
        self._window.append(slot)
        decision = self._planner.plan(forced)
        self._last = decision
        if self._recorder is not None:
            self._recorder.decided(decision)
        # The caller may change what `last` gives.
        return decision.action_chunk.copy()

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise ForkError(
                "this process was forked after the policy had been loaded, and the backend's "
                "threads and memory stayed behind; load the policy in the new process"
            )
        self._window.graphs.check_open()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with computing():
            self._check_usable()
            if not self._lock.acquire(blocking=False):
                raise ConcurrentUseError(
                    "another call on this policy is still running; use one sibling() per thread"
                )
            try:
                yield
            except Exception as error:
                if self._recorder is not None:
                    self._recorder.failed(error)
                raise
            finally:
                self._lock.release()
