"""`EdgePolicy`: observations in, actions out."""

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np

from vqbet_edge.backends import BackendName, create_backend
from vqbet_edge.backends.base import Backend, Floats, Idle
from vqbet_edge.bundle import DECODE_TABLE, SECONDARY_COLUMNS, Bundle
from vqbet_edge.errors import (
    ConcurrentUseError,
    HistoryError,
    NonFiniteError,
    UsageError,
)
from vqbet_edge.idle import IdleWorker
from vqbet_edge.manifest import Manifest
from vqbet_edge.normalization import Affine
from vqbet_edge.observation import Observation, ObservationReader
from vqbet_edge.recording import Recorder
from vqbet_edge.sampling import Choice, Codes, CodeSampler, Decision
from vqbet_edge.window import ObservationWindow, Slot


class EdgePolicy:
    """A VQ-BeT policy that acts without PyTorch.

    It does what LeRobot's `VQBeTPolicy.select_action` does, normalisation included. One object is
    used by one thread at a time. Actions have the robot's units; for a bundle exported for a batch
    of B > 1, every action and chunk has a leading axis of B.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        seed: int = 0,
        temperature: float | None = None,
        replan_every: int | None = None,
        idle: Idle | None = None,
    ) -> None:
        """Use `EdgePolicy.load`, which also creates the backend."""
        manifest, arrays = bundle.manifest, bundle.arrays
        policy = manifest.policy
        self._manifest, self._backend = manifest, backend
        self._replan_every = _checked_replan(replan_every, policy.action_chunk_size)
        self._sampler = CodeSampler(
            policy.bet_softmax_temperature if temperature is None else _checked(temperature),
            _secondary_columns(bundle),
            _checked_seed(seed),
        )
        self._table = _decode_table(bundle)
        self._reader = ObservationReader(
            manifest, Affine.from_arrays(arrays, "state", manifest.state_dim)
        )
        self._unnormalize = Affine.from_arrays(arrays, "action", manifest.action_dim)
        self._window = ObservationWindow(manifest, backend, self._replan_every)
        self._idle = _checked_idle(idle or backend.default_idle)
        self._worker = IdleWorker()
        self._recorder: Recorder | None = None
        self._queue: deque[Floats] = deque()
        self._last: Decision | None = None
        self._lock = threading.Lock()
        self._broken = False

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        backend: BackendName = "auto",
        *,
        seed: int = 0,
        temperature: float | None = None,
        replan_every: int | None = None,
        idle: Idle | None = None,
    ) -> "EdgePolicy":
        """Load a bundle that `vqbet-export` wrote.

        Args:
            bundle: the bundle's directory.
            backend: who runs the graphs; `auto` takes the fastest that is there.
            seed: start of the random sequence that codes are drawn with.
            temperature: of the code distribution; None takes the checkpoint's, 0 is greedy.
            replan_every: predict a new chunk after so many actions, 1 to `action_chunk_size`;
                None executes whole chunks.
            idle: where the work is done that the next prediction needs and that can be done before
                its observation comes (frames on queued steps, the transformer's past): `thread`
                after `act` has returned, `inline` inside `act` on queued steps, `off` not before
                the prediction. None takes what was measured to be best for the backend. The
                actions are the same to rounding.

        Raises:
            BundleError: the bundle is missing, incomplete or altered.
            BackendError: the backend is missing or refuses the bundle.
            UsageError: an argument is out of range.
        """
        opened = Bundle.open(bundle)
        return cls(
            opened,
            create_backend(backend, opened),
            seed=seed,
            temperature=temperature,
            replan_every=replan_every,
            idle=idle,
        )

    @property
    def last(self) -> Decision | None:
        """The latest decision, None before the first."""
        return self._last

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about the policy."""
        return self._manifest

    @property
    def backend_name(self) -> str:
        """The backend that runs the graphs."""
        return self._backend.name

    def reset(self, seed: int | None = None) -> None:
        """Forget history and queued actions; call it at the start of every episode.

        Args:
            seed: a new start of the random sequence; None lets it run on.
        """
        with self._exclusive():
            if seed is not None:
                self._sampler.reseed(_checked_seed(seed))
            self._worker.forget()
            if self._recorder is not None:
                self._recorder.begin_episode()
            self._window.clear()
            self._queue.clear()
            self._last = None
            self._broken = False

    def act(self, observation: Observation) -> Floats:
        """The action for this observation.

        The observation enters the history on every call; a new chunk is predicted only when the
        queue of actions is empty. `vqbet_edge.observation` draws what an observation looks like.

        Returns:
            float32 (action_dim,).

        Raises:
            ObservationError: the observation does not fit; the history is as before the call.
            NonFiniteError: the network produced NaN or infinity.
            HistoryError: an earlier call failed after its observation had entered the history.
            ConcurrentUseError: another call on this object is running.
        """
        with self._exclusive():
            slot = self._read(observation)
            if self._queue:
                action = self._queue.popleft()
                # Otherwise the frame will have left the window before the next prediction.
                seen = len(self._queue) + 1 < self._manifest.policy.n_obs_steps
                self._append_idly(slot, encode=seen)
                return action
            with self._history():
                chunk = self._plan(slot, None)
                self._queue.extend(chunk[step] for step in range(self._replan_every))
                action = self._queue.popleft()
            self._prepare_next()
            return action

    def act_chunk(
        self, observation: Observation, codes: Sequence[int] | Codes | None = None
    ) -> Floats:
        """Append the observation and predict a chunk at once; queued actions are dropped.

        Args:
            observation: as for `act`.
            codes: (primary, secondary) to force instead of drawing them, (B, 2) for a batch.

        Returns:
            float32 (action_chunk_size, action_dim).

        Raises:
            UsageError: a forced code is not in the code book.
        """
        with self._exclusive():
            forced = None if codes is None else self._checked_codes(codes)
            slot = self._read(observation)
            with self._history():
                self._queue.clear()
                chunk = self._plan(slot, forced)
            self._prepare_next()
            return chunk.swapaxes(0, 1) if self._manifest.batch_size > 1 else chunk

    @contextmanager
    def record(self, folder: str | os.PathLike[str], *, max_bytes: int = 1 << 30) -> Iterator[None]:
        """Write every observation, as it came, to a folder: `with policy.record("seen"): ...`.

        `vqbet-export --int8 --calibration-data` takes the folder; `vqbet_edge.recording` says what
        is in it. Acting does not wait for the disk.

        Args:
            folder: where to; one recording per folder.
            max_bytes: recording ends, with a warning, before there is more than this.

        Raises:
            UsageError: the folder holds a recording already, or the limit is below one observation.
            DiskError: the folder cannot be written; raised at the block's end if it failed later.
        """
        recorder = Recorder(self._manifest, Path(folder), max_bytes)
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None
            recorder.close()

    def _read(self, observation: Observation) -> Slot:
        """Check an observation and keep it; only what fails after this breaks the history."""
        if self._broken:
            raise HistoryError(
                "an earlier call failed after its observation had entered the history, so the "
                "window no longer shows what happened; stop the robot and call reset()"
            )
        with self._history():
            self._worker.check()
        slot = self._window.next_slot()
        self._reader.read(observation, slot.frames, slot.states)
        if self._recorder is not None:
            self._recorder.append(observation)
        return self._window.take_slot()

    @contextmanager
    def _history(self) -> Iterator[None]:
        """What fails in here leaves the window unusable."""
        self._broken = True
        yield
        self._broken = False

    def _append_idly(self, slot: Slot, *, encode: bool) -> None:
        """Take a queued step's observation into the window, now or while the robot moves."""
        last = not self._queue

        def work() -> None:
            self._window.append(slot)
            if encode and self._idle != "off":
                self._window.encode_newest()
            if last and self._idle != "off":
                self._window.prefill()

        if self._idle == "thread":
            self._worker.submit(work)
        else:
            with self._history():
                work()

    def _prepare_next(self) -> None:
        """After a prediction: if the next call predicts too, get ready for it."""
        if self._idle == "thread" and not self._queue:
            self._worker.submit(self._window.prefill)

    def _plan(self, slot: Slot, forced: Codes | None) -> Floats:
        """Predict, decide, un-normalise: (W, A), or (W, B, A) for a batch."""
        self._worker.wait()
        self._window.append(slot)
        outputs = self._window.predict()
        choice = self._sampler.choose(outputs, forced)
        rows = np.arange(len(choice.codes))
        primary, secondary = choice.codes.T
        offsets = outputs.offsets[rows, 0, primary] + outputs.offsets[rows, 1, secondary]
        decoded = self._decode(choice.codes)
        chunk = decoded + offsets  # (B, W, A)
        chunk = self._unnormalize.apply(chunk, chunk).swapaxes(0, 1)
        if not (np.isfinite(outputs.offsets).all() and np.isfinite(chunk).all()):
            raise NonFiniteError("the predicted actions are not finite; none is executed")
        self._last = self._decision(choice, decoded, offsets)
        return chunk[:, 0] if self._manifest.batch_size == 1 else chunk

    def _decode(self, codes: Codes) -> Floats:
        """Code pairs (B, 2) -> chunks (B, W, A), normalised."""
        if self._table is None:
            return self._backend.decode(codes)
        return self._table[codes[:, 0], codes[:, 1]]

    def _decision(self, choice: Choice, decoded: Floats, offsets: Floats) -> Decision:
        keep = 0 if self._manifest.batch_size == 1 else slice(None)
        return Decision(
            codes=choice.codes[keep],
            code_probabilities=choice.probabilities[keep],
            decoded_chunk=decoded[keep].copy(),
            offset_chunk=offsets[keep],
            seconds=dict(self._backend.seconds),
        )

    def _checked_codes(self, codes: Sequence[int] | Codes) -> Codes:
        batch, size = self._manifest.batch_size, self._manifest.policy.vqvae_n_embed
        try:
            array = np.asarray(codes)
        except ValueError:  # ragged
            array = np.zeros(0)
        if array.shape == (2,) and batch == 1:
            array = array[None]
        valid = array.shape == (batch, 2) and np.issubdtype(array.dtype, np.integer)
        if not valid or array.min() < 0 or array.max() >= size:
            raise UsageError(f"expected codes (primary, secondary) in 0..{size - 1}, got {codes}")
        return array.astype(np.int64)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(
                "another call on this policy is still running; load one policy per thread"
            )
        try:
            yield
        finally:
            self._lock.release()


def _checked(temperature: float) -> float:
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise UsageError(f"expected a temperature of 0 (greedy) or more, got {temperature!r}")
    return temperature


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(f"expected a seed of 0 or more, got {seed!r}")
    return int(seed)


def _checked_replan(replan_every: int | None, chunk_size: int) -> int:
    if replan_every is None:
        return chunk_size
    if not isinstance(replan_every, (int, np.integer)) or not 1 <= replan_every <= chunk_size:
        raise UsageError(f"expected replan_every in 1..{chunk_size}, got {replan_every!r}")
    return int(replan_every)


def _checked_idle(idle: Idle) -> Idle:
    if idle not in get_args(Idle):
        raise UsageError(f"expected idle to be one of {get_args(Idle)}, got {idle!r}")
    return idle


def _secondary_columns(bundle: Bundle) -> Floats | None:
    if not bundle.manifest.policy.sequentially_select:
        return None
    size = bundle.manifest.policy.vqvae_n_embed
    return bundle.array(SECONDARY_COLUMNS, (size, size))


def _decode_table(bundle: Bundle) -> Floats | None:
    if DECODE_TABLE not in bundle.arrays:
        return None
    policy, action_dim = bundle.manifest.policy, bundle.manifest.action_dim
    codes = policy.vqvae_n_embed
    return bundle.array(DECODE_TABLE, (codes, codes, policy.action_chunk_size, action_dim))
