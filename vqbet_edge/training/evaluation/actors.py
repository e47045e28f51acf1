"""Policies as the evaluation drives them: a slot per environment that runs at the same time."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.backends.base import Backend, Part, Window
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.training.backend import TorchBackend, load_backend

Floats = npt.NDArray[np.float32]
Observations = Mapping[str, npt.NDArray[Any]]  # a leading axis of slots


class Actor(Protocol):
    """Drives several environments at once."""

    def reset(self, slot: int, seed: int) -> None:
        """Begin an episode in a slot."""

    def act(self, observations: Observations) -> Floats:
        """Actions (slots, A) for observations with a leading axis of slots."""


def load_actor(
    source: str,
    slots: int,
    backend: BackendName = "auto",
    *,
    temperature: float | None = None,
    replan_every: int | None = None,
    guards: Guards | None = None,
) -> "Siblings":
    """A bundle or a checkpoint, by what is there; see `EdgePolicy.load` for the options.

    Raises:
        CheckpointError: it is neither, or not whole.
        BundleError: the bundle is not whole.
    """
    loaded = load_backend(source, backend)
    return Siblings(
        *loaded, slots, temperature=temperature, replan_every=replan_every, guards=guards
    )


class Siblings:
    """A policy for every slot, all on the same weights.

    Those of a bundle act one after another, as on as many robots; in PyTorch, they share runs.
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
        together = slots > 1 and isinstance(backend, TorchBackend)
        self._together = _Together(backend, slots) if together else None

    def reset(self, slot: int, seed: int) -> None:
        """See `Actor`."""
        self.policies[slot].reset(seed)

    def act(self, observations: Observations) -> Floats:
        """See `Actor`."""
        rows = [{k: v[i] for k, v in observations.items()} for i in range(len(self.policies))]
        if self._together is not None:
            return np.stack(self._together.act(self.policies, rows))
        return np.stack([p.act(row) for p, row in zip(self.policies, rows, strict=True)])


class _Together:
    """Policies that act in a thread each; the runs that they wait for are one run, in the caller's.

    PyTorch keeps threads of its own for every thread that computes, so one thread does.
    """

    def __init__(self, backend: Backend, slots: int) -> None:
        self._backend, self._threads = backend, ThreadPoolExecutor(slots)
        self._changed, self._slot = threading.Condition(), threading.local()
        self._waiting: dict[int, Window] = {}
        self._acting, self._failed = 0, False
        backend.gather = self._gather

    def act(self, policies: Sequence[EdgePolicy], rows: Sequence[Observations]) -> list[Floats]:
        """The action of each."""
        self._acting = len(policies)
        calls = [
            self._threads.submit(self._act, slot, policy.act, row)
            for slot, (policy, row) in enumerate(zip(policies, rows, strict=True))
        ]
        with self._changed:
            try:
                while self._acting:
                    self._changed.wait_for(lambda: len(self._waiting) == self._acting)
                    if self._waiting:
                        windows = [window for _, window in sorted(self._waiting.items())]
                        self._backend.run_together("window", windows)
                        self._waiting.clear()
                        self._changed.notify_all()
            finally:
                self._failed = self._acting > 0
                self._changed.notify_all()
        return [call.result() for call in calls]

    def _act(self, slot: int, act: Callable[[Observations], Floats], row: Observations) -> Floats:
        self._slot.number = slot
        try:
            return act(row)
        finally:
            with self._changed:
                self._acting -= 1
                self._changed.notify_all()

    def _gather(self, window: Window, part: Part) -> None:
        del part
        slot = self._slot.number
        with self._changed:
            self._waiting[slot] = window
            self._changed.notify_all()
            self._changed.wait_for(lambda: slot not in self._waiting or self._failed)
            if self._failed:
                raise BackendError("the run that this policy waited for with others failed")
