"""`EdgePolicy`: observations in, actions out."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike

from vqbet_edge.errors import (
    ConcurrentUseError,
    DeadlineError,
    ForkError,
    HistoryError,
    UsageError,
)
from vqbet_edge.runtime.arguments import (
    checked_action,
    checked_codes,
    checked_prefetch,
    checked_replan,
    checked_seed,
    checked_temperature,
)
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.backends.base import Backend, Floats, Prefetch
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.ending import computing
from vqbet_edge.runtime.guards.actions import ActionGuard, GuardCounts, Step
from vqbet_edge.runtime.guards.clock import ObservationClock
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.deadline import Deadline
from vqbet_edge.runtime.guards.limits import tell_of_limits
from vqbet_edge.runtime.guards.states import StateGuard
from vqbet_edge.runtime.hub import local_bundle
from vqbet_edge.runtime.manifest import STATE_RANGE, Manifest
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.observation import Observation, ObservationReader
from vqbet_edge.runtime.planning import (
    Planner,
    action_scaling,
    decode_table,
    secondary_columns,
)
from vqbet_edge.runtime.recording import Recorder
from vqbet_edge.runtime.recording_format import Outcome, PolicyInfo
from vqbet_edge.runtime.sampling import Codes, CodeSampler, Decision
from vqbet_edge.runtime.window import ObservationWindow, Slot
from vqbet_edge.runtime.worker import Backlog, Worker

# What is computed ahead takes a fraction of a second; a backend that hangs, for ever.
_PATIENCE_S = 5.0


class EdgePolicy:
    """A VQ-BeT policy that acts without PyTorch.

    It does what LeRobot's `VQBeTPolicy.select_action` does, normalisation included. One object
    drives one robot and is used by one thread at a time; `sibling` makes others on the same
    weights, which other threads may use meanwhile. Actions have the robot's units.
    """

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
        """Use `EdgePolicy.load`, which also creates the backend."""
        manifest, arrays = bundle.manifest, bundle.arrays
        policy = manifest.policy
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
        state = Affine.from_arrays(arrays, "state", manifest.state_dim)
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

    @classmethod
    @computing()
    def load(
        cls,
        bundle: str | os.PathLike[str],
        backend: BackendName = "auto",
        *,
        revision: str | None = None,
        seed: int = 0,
        temperature: float | None = None,
        replan_every: int | None = None,
        prefetch: Prefetch | None = None,
        guards: Guards | None = None,
        prove: bool = False,
    ) -> "EdgePolicy":
        """Load a bundle that `vqbet-export` wrote.

        Args:
            bundle: the bundle's directory, or the id of a repository on the Hugging Face Hub.
            backend: who runs the graphs; `auto` takes the fastest that is there.
            revision: of the repository: a branch, tag or commit.
            seed: start of the random sequence that codes are drawn with.
            temperature: of the code distribution; None takes the checkpoint's, 0 is greedy.
            replan_every: predict a new chunk after so many actions, 1 to `action_chunk_size`;
                None executes whole chunks.
            prefetch: when the work is done that the next prediction needs and that can be done
                before its observation comes (frames on queued steps, the transformer's past):
                `thread` after `act` has returned, `inline` inside `act` on queued steps, `off` not
                before the prediction. None takes what was measured to be best for the backend.
                The actions are the same to rounding.
            guards: limits on actions, the age of observations and the time that `act` takes; None
                takes `Guards()`, which clamps actions to the training data's range and a margin.
            prove: act the bundle's reference cases out first, which takes about a second: the
                proof that this machine computes the policy that was trained.

        Raises:
            BundleError: the bundle is missing, incomplete or altered.
            VerificationError: the backend computes something else.
            BackendError: the backend is missing or refuses the bundle.
            UsageError: an argument is out of range.
        """
        opened = Bundle.open(local_bundle(bundle, revision))
        loaded = create_backend(backend, opened)
        try:
            policy = cls(
                opened,
                loaded,
                seed=seed,
                temperature=temperature,
                replan_every=replan_every,
                prefetch=prefetch,
                guards=guards,
            )
            policy._tell_of_limits()
            if prove:
                # It is built on this class.
                from vqbet_edge.runtime import proof  # noqa: PLC0415

                proof.prove(opened, loaded)
        except BaseException:
            loaded.close()  # a device's memory is not Python's to collect
            raise
        return policy

    @computing()
    def sibling(self, *, seed: int = 0) -> "EdgePolicy":
        """A policy for another robot, on the same weights and with the same options.

        It has a history, a queue, a random sequence and guards of its own, and acts bitwise as a
        policy that was loaded alone with this seed. Siblings may act at the same time, each in a
        thread of its own.

        Args:
            seed: start of its random sequence.

        Raises:
            BackendError: the policy is closed.
            ForkError: the policy was loaded before this process was forked.
            UsageError: the seed is negative.
        """
        self._check_usable()
        return EdgePolicy(
            self._bundle,
            self._backend,
            seed=seed,
            temperature=self._temperature,
            replan_every=self._replan_every,
            prefetch=self._prefetch,
            guards=self._guards,
        )

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

    def __enter__(self) -> "EdgePolicy":  # noqa: PYI034 - Self needs Python 3.11
        """The policy itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __reduce__(self) -> NoReturn:
        """A backend cannot be pickled."""
        raise UsageError(
            "a policy cannot be copied or sent to another process; call EdgePolicy.load there, or "
            "sibling() for another robot in this process"
        )

    @property
    def last(self) -> Decision | None:
        """The latest decision, None before the first."""
        return self._last

    @property
    def upcoming(self) -> Floats | None:
        """What `act` would return if it were called again and never predicted: float32 (n, A).

        The first is the latest action, the others follow in the chunk, for controllers that take
        trajectories; of a chunk from `act_chunk`, which is executed whole, the last is left, and
        after a late call that held, what it held. None before the first call. Guards that limit
        change are not applied.
        """
        return self._actions.upcoming

    @property
    def guard_counts(self) -> GuardCounts:
        """How often guards stepped in since the policy was loaded."""
        actions = self._actions
        return GuardCounts(actions.clamped, actions.slowed, actions.late, self._states.far)

    @property
    def action_limits(self) -> tuple[Floats, Floats] | None:
        """Lowest and highest that actions are clamped to, float32 (A,) each; None: they are not."""
        limits = self._actions.limits
        return None if limits is None else (limits.low.copy(), limits.high.copy())

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about the policy."""
        return self._manifest

    @property
    def backend_name(self) -> str:
        """The backend that runs the graphs."""
        return self._backend.name

    @property
    def fps(self) -> float | None:
        """Observations a second that the policy was trained on, None where not known."""
        return self._manifest.fps

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
            step = self._step(slot) if self._deadline is None else self._in_time(slot, start)
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

    @contextmanager
    def record(
        self,
        folder: str | os.PathLike[str],
        *,
        decisions: bool = False,
        max_bytes: int = 1 << 30,
    ) -> Iterator[None]:
        """Write every observation, as it came, to a folder: `with policy.record("seen"): ...`.

        `vqbet-export --int8 --calibration-data` takes the folder, and with decisions `vqbet-view`
        shows it; docs/recording.md says what is in it. Acting does not wait for the disk: what a
        slow one does not take in is left out, logged and reported at the block's end.

        Args:
            folder: where to; one recording per folder.
            decisions: write actions, their times and everything about decisions too.
            max_bytes: recording ends, with a warning, before there is more than this.

        Raises:
            UsageError: the policy records already, the folder holds a recording, or the limit is
                below one observation.
            DiskError: the folder cannot be written; raised at the block's end if it failed later
                or was too slow.
        """
        if self._recorder is not None:
            raise UsageError(
                f"this policy records to '{self._recorder.folder}' already; leave that block "
                "first: one recording at a time, and one per robot"
            )
        policy = self._info() if decisions else None
        kept = self._window.kept
        recorder = Recorder(self._manifest, Path(folder), max_bytes, policy, kept)
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None
            recorder.close()

    def _tell_of_limits(self) -> None:
        """At loading; siblings have the same."""
        scaling = action_scaling(self._bundle)
        inferred = self._manifest.format_version == 2 and scaling.base is None
        tell_of_limits(self._guards, scaling.limits, inferred=inferred)

    def _info(self) -> PolicyInfo:
        """For who reads the recording."""
        limits = self.action_limits
        return PolicyInfo(
            bundle=self._bundle.path.name,
            manifest_sha256=self._manifest.manifest_sha256,
            precision=self._manifest.precision,
            backend=self._backend.name,
            seed=self._seed,
            temperature=float(self._temperature),
            replan_every=self._replan_every,
            n_obs_steps=self._manifest.policy.n_obs_steps,
            action_limits=limits and (tuple(limits[0].tolist()), tuple(limits[1].tolist())),
        )

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
            self._recorder.append(observation)
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

    def _step(self, slot: Slot) -> Step:
        """Take an observation into the history and the next action from the queue."""
        if self._queue:
            step = self._queue.popleft()
            # Otherwise the frame will have left the window before the next prediction.
            seen = len(self._queue) + 1 < self._manifest.policy.n_obs_steps
            self._append_queued(slot, encode=seen)
            return step
        with self._history():
            chunk = self._plan(slot, None)
            self._queue.extend(Step(chunk, position) for position in range(self._replan_every))
            step = self._queue.popleft()
        self._prepare_next()
        return step

    def _in_time(self, slot: Slot, start: float) -> Step | None:
        """The next action, None when the backend is late."""

        def checked() -> Step:
            self._check_history()
            return self._step(slot)

        assert self._deadline is not None  # noqa: S101 - for the type checker
        return self._deadline.run(checked, start)

    def _await_backend(self) -> None:
        """Wait for what is computed ahead, and forget what earlier calls left behind."""
        late = self._deadline is not None and self._deadline.busy
        if late or self._prefetching.running(_PATIENCE_S):
            raise DeadlineError(
                "the backend still works on an earlier call; wait for it, or load a new policy"
            )
        if self._deadline is not None:
            self._deadline.forget()
        self._prefetching.clear()

    @contextmanager
    def _history(self) -> Iterator[None]:
        """What fails in here leaves the window unusable."""
        self._broken = True
        yield
        self._broken = False

    def _append_queued(self, slot: Slot, *, encode: bool) -> None:
        """Take a queued step's observation into the window, now or while the robot moves."""
        last = not self._queue

        def work() -> None:
            self._window.append(slot)
            if encode and self._prefetch != "off":
                self._window.encode_newest()
            if last and self._prefetch != "off":
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
            finally:
                self._lock.release()
