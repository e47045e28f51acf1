"""`EdgePolicy`: observations in, actions out."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime import proof
from vqbet_edge.runtime.acting import ActingPolicy
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.backends.base import Floats, Prefetch
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.ending import computing
from vqbet_edge.runtime.guards.actions import GuardCounts
from vqbet_edge.runtime.guards.config import Guards
from vqbet_edge.runtime.guards.limits import tell_of_limits
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.recording import Keep, Recorder
from vqbet_edge.runtime.recording_format import PolicyInfo
from vqbet_edge.runtime.timing import check_prediction_time


class EdgePolicy(ActingPolicy):
    """A VQ-BeT policy that acts without PyTorch.

    It does what LeRobot's `VQBeTPolicy.select_action` does, normalisation included. One object
    drives one robot and is used by one thread at a time; `sibling` makes others on the same
    weights, which other threads may use meanwhile. Actions have the robot's units.
    """

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
        require: Collection[BackendName] = (),
        predict_within_s: float | None = None,
    ) -> "EdgePolicy":
        """Load a bundle that `vqbet-export` wrote.

        Args:
            bundle: the bundle's directory, or the id of a repository on the Hugging Face Hub:
                "user/name" or "user/name@revision".
            backend: who runs the graphs; `auto` takes the fastest that is there.
            revision: of the repository, if the id names none: a branch, tag or commit.
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
            require: backends of which it must be one: `auto` takes the first of them that is there,
                and none is an error. Empty: any.
            predict_within_s: what a prediction may take on this machine; see
                `check_prediction_time`. None: as long as it takes.

        Raises:
            BundleError: the bundle is missing, incomplete or altered.
            VerificationError: the backend computes something else.
            BackendError: the backend is missing, refuses the bundle or is too slow.
            UsageError: an argument is out of range.
        """
        opened = Bundle.open(bundle, revision)
        loaded = create_backend(backend, opened, require=require)
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
            relative = any(opened.manifest.policy.relative_actions)
            inferred = opened.manifest.format_version == 2 and not relative
            tell_of_limits(policy._guards, policy._actions.limits, inferred=inferred)
            if prove:
                proof.prove(opened, loaded)
            if predict_within_s is not None:
                policy.check_prediction_time(predict_within_s)
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

    def check_prediction_time(self, within_s: float) -> None:
        """Predict a few times, for nobody, and refuse a backend that is too slow.

        It leaves no trace in this policy. What counts is the median, of the best of three rounds,
        as in a robot's loop: without what is computed ahead, unless `replan_every` is 1, which
        leaves no time for that.

        Args:
            within_s: seconds that a prediction may take; infinite, nothing is too slow, and the
                policy is warm afterwards.

        Raises:
            BackendError: it takes longer here.
            UsageError: `within_s` is not above 0.
        """
        self._check_usable()
        check_prediction_time(
            self._bundle,
            self._backend,
            within_s,
            prefetch=self._prefetch,
            replan_every=self._replan_every,
        )

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

    @contextmanager
    def record(
        self,
        folder: str | os.PathLike[str],
        *,
        decisions: bool = False,
        max_bytes: int = 1 << 30,
        keep: Keep = "first",
    ) -> Iterator[None]:
        """Write every observation, as it came, to a folder: `with policy.record("seen"): ...`.

        `vqbet-export --int8 --calibration-data` takes the folder, and with decisions `vqbet-view`
        shows it; docs/recording.md says what is in it. Acting does not wait for the disk: what a
        slow one does not take in is left out, logged and reported at the block's end.

        Args:
            folder: where to; one recording per folder.
            decisions: write actions, their times and everything about decisions too.
            max_bytes: there is never more than this, but for one file that is being written.
            keep: what of a recording that is full: `first`, and it ends with a warning, or `last`,
                and its oldest files make room, so that what has just happened is in it.

        Raises:
            UsageError: the policy records already, the folder holds a recording, the limit is
                below one observation (four with `last`), or `keep` is neither.
            DiskError: the folder cannot be written; raised at the block's end if it failed later
                or was too slow.
        """
        if self._recorder is not None:
            raise UsageError(
                f"this policy records to '{self._recorder.folder}' already; leave that block "
                "first: one recording at a time, and one per robot"
            )
        manifest, limits = self._manifest, self.action_limits
        info = PolicyInfo(
            bundle=self._bundle.path.name,
            manifest_sha256=manifest.manifest_sha256,
            precision=manifest.precision,
            backend=self._backend.name,
            seed=self._seed,
            temperature=float(self._temperature),
            replan_every=self._replan_every,
            n_obs_steps=manifest.policy.n_obs_steps,
            action_limits=limits and (tuple(limits[0].tolist()), tuple(limits[1].tolist())),
            fps=manifest.fps,
        )
        kept, policy = self._window.kept, info if decisions else None
        self._recorder = recorder = Recorder(manifest, Path(folder), max_bytes, policy, kept, keep)
        try:
            yield
        finally:
            self._recorder = None
            recorder.close()

    def mark(self, text: str) -> None:
        """Mark this moment in the recording, for `vqbet-view` to find; any thread may call this.

        The first of failed calls in a row and the first of late ones are marked by themselves.

        Args:
            text: what happened; a line of 1000 characters at most, the rest is cut.

        Raises:
            UsageError: the policy does not record, or this is no text.
        """
        recorder = self._recorder
        if recorder is None:
            raise UsageError("nothing is recorded; call mark inside `with policy.record(...): ...`")
        if not isinstance(text, str) or not text:
            raise UsageError(f"expected a text that says what happened, got {text!r}")
        recorder.mark(text)
