"""Policies that decide on recorded observations, with recorded random numbers."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.guards.actions import ActionGuard
from vqbet_edge.runtime.hub import is_bundle
from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.observation import Observation, ObservationReader
from vqbet_edge.runtime.planning import Planner, action_scaling, decode_table, secondary_columns
from vqbet_edge.runtime.sampling import CodeSampler
from vqbet_edge.runtime.window import ObservationWindow
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.evaluation.actors import ActorOptions, TorchActor

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Redecided:
    """What a policy decides on a recorded window.

    Attributes:
        codes: int64 (2,).
        probabilities: float64 (2, C).
        chunk: float32 (W, A), in the robot's units, not clamped.
    """

    codes: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    chunk: Floats


@dataclass(frozen=True)
class ReplayFacts:
    """What a replay needs to know of a policy.

    Attributes:
        precision: of its arithmetic.
        runs_on: who runs it.
        shapes: of what it observes, by key.
        n_obs_steps: observations in a window.
        action_scale: float32 (A,), what 1 of a normalised action is in the robot's units.
    """

    precision: Precision
    runs_on: str
    shapes: dict[str, tuple[int, ...]]
    n_obs_steps: int
    action_scale: Floats


class Replayer(Protocol):
    """A policy without a queue: it decides when it is asked to."""

    facts: ReplayFacts

    def begin(self) -> None:
        """Forget the history."""

    def see(self, observation: Observation) -> None:
        """Take an observation into the window."""

    def decide(self, draws: npt.NDArray[np.float64]) -> Redecided:
        """Decide on the window, with random numbers (2,)."""


def load_replayer(source: str, backend: BackendName, temperature: float) -> Replayer:
    """A bundle or a checkpoint, by what is there.

    Raises:
        CheckpointError: it is neither, or not whole.
        BundleError: the bundle is not whole.
        BackendError: the backend is missing or refuses it.
    """
    if is_bundle(source):
        return _BundleReplayer(Bundle.open(source), backend, temperature)
    return _CheckpointReplayer(source, temperature)


class _BundleReplayer:
    """The runtime's own reader, window and planner; recorded decisions say when to plan."""

    def __init__(self, bundle: Bundle, backend: BackendName, temperature: float) -> None:
        manifest, loaded = bundle.manifest, create_backend(backend, bundle)
        state = Affine.from_arrays(bundle.arrays, "state", manifest.state_dim)
        scaling = action_scaling(bundle)
        trained = manifest.policy.bet_softmax_temperature
        sampler = CodeSampler(temperature, trained, secondary_columns(bundle), 0)
        guard = ActionGuard(Guards(action_limits=None), None, manifest.action_dim)
        self._reader = ObservationReader(manifest, state)
        self._window = ObservationWindow(manifest, loaded.create_window(), waiting=0)
        table = decode_table(bundle)
        self._planner = Planner(self._window, sampler, table, scaling, guard)
        self.facts = ReplayFacts(
            precision=manifest.precision,
            runs_on=loaded.name,
            shapes=manifest.observation_shapes,
            n_obs_steps=manifest.policy.n_obs_steps,
            action_scale=np.abs(scaling.affine.multiply),
        )

    def begin(self) -> None:
        self._window.clear()

    def see(self, observation: Observation) -> None:
        slot = self._window.next_slot()
        self._reader.read(observation, slot.frames, slot.state)
        self._window.append(self._window.take_slot())

    def decide(self, draws: npt.NDArray[np.float64]) -> Redecided:
        made = self._planner.plan(draws=draws)
        return Redecided(made.codes, made.code_probabilities, made.action_chunk)


class _CheckpointReplayer:
    """PyTorch's own network, in the precision of its weights."""

    def __init__(self, source: str, temperature: float) -> None:
        checkpoint = load_checkpoint(source)
        self._actor = TorchActor(checkpoint, 1, ActorOptions(temperature=temperature))
        self.facts = ReplayFacts(
            precision="fp32",
            runs_on="PyTorch",
            shapes=checkpoint.observation_shapes,
            n_obs_steps=checkpoint.config.n_obs_steps,
            action_scale=np.abs(checkpoint.action.multiply),
        )

    def begin(self) -> None:
        self._actor.reset(0, seed=0)

    def see(self, observation: Observation) -> None:
        rows: dict[str, npt.NDArray[Any]] = {k: observation[k][None] for k in self.facts.shapes}
        self._actor.see(rows)

    def decide(self, draws: npt.NDArray[np.float64]) -> Redecided:
        features = self._actor.features([0])
        (choice,) = choices = self._actor.choose(features, [0], draws)
        (chunk,) = self._actor.scaled(self._actor.decode(features, choices), [0])
        return Redecided(choice.codes, choice.probabilities, chunk)
