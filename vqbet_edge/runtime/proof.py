"""Proof that a loaded backend computes the policy that was exported, by the bundle's own cases.

The export proves graphs against PyTorch on the desk; another processor, another ONNX Runtime or
TensorRT's choice of kernels is another computation. So a bundle carries reference cases. They are
acted out on the backend through `EdgePolicy` itself, with the reference's codes forced, so that
crop, normalisation, window and decode table are proven too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import NonFiniteError, VerificationError
from vqbet_edge.runtime.backends.base import Backend, Prefetch, Window
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import PolicyOutputs, ReferenceCases
from vqbet_edge.runtime.comparison import (
    LIMITS,
    Limits,
    PolicyComparison,
    PolicyResult,
    StageComparison,
    StageResult,
)
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.manifest import Precision, StageName
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.observation import Observation
from vqbet_edge.runtime.policy import EdgePolicy

# Stages run one behind the other here, so the cosine of each has the errors of those before in it.
_BEHIND: dict[StageName, int] = {"vision_encoder": 0, "gpt": 1, "code_heads": 2, "rvq_decoder": 0}


@dataclass(frozen=True)
class Proof:
    """How far a backend is from the reference on the bundle's cases.

    Attributes:
        backend: who ran the graphs.
        precision: whose limits hold.
        steps: predictions that were compared: every observation's, with and without working ahead.
        stages: of every stage, behind those before it.
        policy: of the whole policy, with the reference's codes forced.
    """

    backend: str
    precision: Precision
    steps: int
    stages: dict[StageName, StageResult]
    policy: PolicyResult

    @property
    def violations(self) -> list[str]:
        """What breaks the limits, one line each; empty is good."""
        limits = LIMITS[self.precision]
        found = self.policy.violations(limits)
        for name, result in self.stages.items():
            found += result.violations(name, _behind(limits, _BEHIND[name]))
        return found

    def table(self) -> list[tuple[str, str]]:
        """What was compared, and its figures."""
        rows = [
            (
                name,
                f"error {r.max_error:.2e}, relative {r.relative_error:.2e}, cosine {r.cosine:.7f}",
            )
            for name, r in self.stages.items()
        ]
        policy = self.policy
        action = f"error {policy.action_error:.3g} in its units, {policy.relative_action_error:.2e}"
        codes = f"agreement {policy.code_agreement:.2%}, probability {policy.probability_error:.2e}"
        return [*rows, ("action", f"{action} of its range"), ("codes", codes)]

    def __str__(self) -> str:
        """All figures, one line each."""
        heading = f"{self.backend}, {self.precision}, {self.steps} predictions"
        return "\n".join([heading, *(f"{name}: {figures}" for name, figures in self.table())])


def prove(bundle: Bundle, backend: Backend) -> Proof:
    """Act the bundle's reference cases out on a backend; takes a second.

    Args:
        bundle: as opened, with all its files.
        backend: with the bundle's graphs; other windows of it may be in use.

    Raises:
        BundleError: the bundle has no reference cases.
        VerificationError: the backend computes something else; the text has all figures.
    """
    try:
        proof = act_out(bundle, backend, ReferenceCases.of(bundle))
    except NonFiniteError as error:
        raise VerificationError(
            f"the backend '{backend.name}' does not compute the policy of '{bundle.path}': {error}"
        ) from error
    if proof.violations:
        raise VerificationError(
            f"the backend '{backend.name}' does not compute the policy of '{bundle.path}': "
            f"{'; '.join(proof.violations)}; do not let it move a robot: update or choose another "
            f"backend, build its engines again, or export with --fp32\n{proof}"
        )
    return proof


def act_out(bundle: Bundle, backend: Backend, cases: ReferenceCases) -> Proof:
    """The figures, whatever they are.

    Raises:
        NonFiniteError: a stage overflows.
    """
    check = PolicyCheck(bundle, backend)
    try:
        for case, prefetch in product(cases.cases, (True, False)):
            observations = cases.observations(case, bundle.manifest)
            check.add(observations, case.outputs, case.clear, prefetch=prefetch)
    finally:
        check.close()
    return Proof(backend.name, bundle.manifest.precision, check.steps, check.stages, check.policy)


class PolicyCheck:
    """Acts on a backend with the reference's codes forced, and compares every stage on the way.

    Args:
        bundle: need not have been verified yet.
        backend: with the bundle's graphs.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        manifest = bundle.manifest
        self._backend = backend
        self._actor = _Actor(bundle, backend, backend.default_prefetch)
        plain = self._actor if not self._actor.prefills else _Actor(bundle, backend, "off")
        self._plain_actor = plain
        action = Affine.from_arrays(bundle.arrays, "action", manifest.action_dim)
        self._whole = PolicyComparison(action.multiply, manifest.policy.bet_softmax_temperature)
        self._frame_tokens, self._feature = StageComparison(), StageComparison()
        self._offsets, self._decoded = StageComparison(), StageComparison()

    def add(
        self,
        observations: Iterable[Observation],
        expected: PolicyOutputs,
        clear: NDArray[np.bool_] | None = None,
        *,
        prefetch: bool = True,
    ) -> None:
        """Act through one episode.

        Args:
            observations: M of them.
            expected: what the reference computes for them.
            clear: (M,), which of its codes rounding cannot exchange; None is all.
            prefetch: work ahead as on a robot that has the time; else as on one that has not,
                which runs other graphs.

        Raises:
            NonFiniteError: a stage overflows.
        """
        actor = self._actor if prefetch else self._plain_actor
        actor.policy.reset()
        for step, observation in enumerate(observations):
            actor.policy.act_chunk(observation, codes=expected.codes[step])
            decision, window, row = actor.policy.last, actor.window, slice(step, step + 1)
            assert decision is not None  # noqa: S101 - a chunk was just predicted
            self._frame_tokens.add(window.read("frame_tokens")[None], expected.frame_tokens[row])
            self._feature.add(window.read("feature")[None], expected.feature[row])
            self._offsets.add(decision.offset_chunk[None], expected.offset_chunk[row])
            self._decoded.add(decision.decoded_chunk[None], expected.decoded_chunk[row])
            chunk = expected.decoded_chunk[step] + expected.offset_chunk[step]
            counts = clear is None or bool(clear[step])
            self._whole.add(decision, expected.logits[step], chunk, clear=counts)

    def close(self) -> None:
        """Free the windows, unless one is the backend's last: the backend stays open."""
        for actor in (self._actor, self._plain_actor):
            if len(self._backend.windows) > 1:
                actor.policy.close()

    @property
    def steps(self) -> int:
        """Predictions so far."""
        return self._whole.steps

    @property
    def stages(self) -> dict[StageName, StageResult]:
        """The figures so far, of every stage behind those before it."""
        return {
            "vision_encoder": self._frame_tokens.result,
            "gpt": self._feature.result,
            "code_heads": self._offsets.result,
            "rvq_decoder": self._decoded.result,
        }

    @property
    def policy(self) -> PolicyResult:
        """The whole policy's figures so far."""
        return self._whole.result


class _Actor:
    """A policy and the window that it acts on."""

    def __init__(self, bundle: Bundle, backend: Backend, prefetch: Prefetch) -> None:
        tap = _Tap(backend)
        # Forced codes may leave the limits, and the reference has none; nor for made-up states.
        guards = Guards(action_limits=None, state_limits=(-math.inf, math.inf))
        self.policy = EdgePolicy(bundle, tap, prefetch=prefetch, guards=guards)
        self.window = tap.window

    @property
    def prefills(self) -> bool:
        """Whether acting with and without working ahead are two ways."""
        return self.window.can_prefill


class _Tap(Backend):
    """A backend that keeps hold of the window that it hands out."""

    name = "tap"
    window: Window

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def create_window(self) -> Window:
        """See `Backend`."""
        self.window = self._backend.create_window()
        return self.window


def _behind(limits: Limits, stages: int) -> Limits:
    """A stage's limits behind others whose cosines may fall as far."""
    if limits.cosine is None:
        return limits
    return replace(limits, cosine=1 - (1 - limits.cosine) * (1 + stages))
