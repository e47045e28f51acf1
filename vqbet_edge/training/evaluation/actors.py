"""Policies as the evaluation drives them: a slot per environment that runs at the same time."""

import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.base import Backend, GptRun, Window
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.training.backend import TorchBackend

Floats = npt.NDArray[np.float32]
Observations = Mapping[str, npt.NDArray[Any]]  # a leading axis of slots


class Actor(Protocol):
    """Drives several environments at once."""

    def reset(self, slot: int, seed: int) -> None:
        """Begin an episode in a slot."""

    def act(self, observations: Observations) -> Floats:
        """Actions (slots, A) for observations with a leading axis of slots."""


class Siblings:
    """A policy for every slot, all on the same weights.

    Those of a bundle act one after another, as on as many robots; in PyTorch, they share runs.

    Args:
        bundle, backend: see `load_backend`.
        slots: how many.
        temperature, replan_every, guards: see `EdgePolicy.load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        slots: int,
        *,
        temperature: float | None = None,
        replan_every: int | None = None,
        guards: Guards | None = None,
    ) -> None:
        first = EdgePolicy(
            bundle, backend, temperature=temperature, replan_every=replan_every, guards=guards
        )
        #: One per slot.
        self.policies = [first, *(first.sibling() for _ in range(slots - 1))]
        self._together: _Together | None = None
        if slots > 1 and isinstance(backend, TorchBackend):
            self._together = _Together(backend, slots)
        self._every = replan_every or bundle.manifest.policy.action_chunk_size
        self._acted = [0] * slots

    def reset(self, slot: int, seed: int) -> None:
        """See `Actor`."""
        self.policies[slot].reset(seed)
        self._acted[slot] = 0

    def act(self, observations: Observations) -> Floats:
        """See `Actor`."""
        rows = [{k: v[i] for k, v in observations.items()} for i in range(len(self.policies))]
        found: dict[int, Floats] = {}
        if self._together is not None:
            # Those that predict; a queued step is not worth a thread.
            due = [slot for slot, acted in enumerate(self._acted) if acted % self._every == 0]
            found = self._together.act(
                {i: functools.partial(self.policies[i].act, rows[i]) for i in due}
            )
        self._acted = [acted + 1 for acted in self._acted]
        return np.stack(
            [found[i] if i in found else p.act(rows[i]) for i, p in enumerate(self.policies)]
        )


class _Together:
    """Policies that act in a thread each; the runs that they wait for are one run, in the caller's.

    PyTorch keeps threads of its own for every thread that computes, so one thread does.
    """

    def __init__(self, backend: Backend, slots: int) -> None:
        self._backend, self._threads = backend, ThreadPoolExecutor(slots)
        self._slot, lock = threading.local(), threading.Lock()
        self._all_here, self._done = threading.Condition(lock), threading.Condition(lock)
        self._waiting: dict[int, Window] = {}
        self._acting, self._failed = 0, False
        backend.run_shared = self._gather

    def act(self, calls: Mapping[int, Callable[[], Floats]]) -> dict[int, Floats]:
        """The action of each slot's call."""
        self._acting = len(calls)
        done = {slot: self._threads.submit(self._act, slot, call) for slot, call in calls.items()}
        with self._all_here:
            try:
                while self._acting:
                    self._all_here.wait_for(self._are_all_here)
                    if self._waiting:
                        windows = [window for _, window in sorted(self._waiting.items())]
                        self._backend.run_together("window", windows)
                        self._waiting.clear()
                        self._done.notify_all()
            finally:
                self._failed = self._acting > 0
                self._done.notify_all()
        return {slot: action.result() for slot, action in done.items()}

    def _are_all_here(self) -> bool:
        return len(self._waiting) == self._acting

    def _act(self, slot: int, act: Callable[[], Floats]) -> Floats:
        self._slot.number = slot
        try:
            return act()
        finally:
            with self._all_here:
                self._acting -= 1
                if self._are_all_here():
                    self._all_here.notify()

    def _gather(self, window: Window, part: GptRun) -> None:
        slot = getattr(self._slot, "number", None)
        if slot is None:  # a call in no thread of these
            window.run_alone(part)
            return
        with self._done:
            self._waiting[slot] = window
            if self._are_all_here():
                self._all_here.notify()
            self._done.wait_for(lambda: slot not in self._waiting or self._failed)
            if self._failed:
                raise BackendError("the run that this policy waited for with others failed")
