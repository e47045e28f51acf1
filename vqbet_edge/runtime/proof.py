"""Proof that a loaded backend computes the policy that was exported, by the bundle's own cases.

The export proves graphs against PyTorch on the desk; another processor, another ONNX Runtime or
TensorRT's choice of kernels is another computation. So a bundle carries reference cases. They are
acted out on the backend as `EdgePolicy` acts, with the reference's codes forced, so that crop,
normalisation, window and decode table are proven too.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import NonFiniteError, VerificationError
from vqbet_edge.runtime.acting import ActingPolicy
from vqbet_edge.runtime.backends.base import Backend, Prefetch
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import CONSTANTS, PolicyOutputs, ReferenceCases, prints
from vqbet_edge.runtime.comparison import (
    LIMITS,
    CodeComparison,
    Floats,
    PolicyComparison,
    PolicyResult,
    StageComparison,
    StageResult,
    action_errors,
    centred,
)
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.observation import Observation
from vqbet_edge.runtime.planning import action_scaling, decode_table, secondary_columns
from vqbet_edge.runtime.sampling import secondary_row

# What is compared, and how many graphs' rounding is in it.
_BEHIND = {"vision_encoder": 0, "gpt": 1, "code logits": 2, "code_heads": 2, "rvq_decoder": 0}
# What is float32 whatever the graphs compute in, and so held to float32's limits.
_EXACT = "state scaling", "decode table"
# One code alone may be so many times as far off as all of them together.
_ONE_CODE = 3.0


@dataclass(frozen=True)
class Proof:
    """How far a backend is from the reference on the bundle's cases.

    Attributes:
        backend: who ran the graphs.
        precision: whose limits hold.
        steps: predictions that were compared: every observation's, with and without working ahead.
        stages: by what was compared: the output of every stage behind those before it, and what
            the runtime computes itself.
        codes: largest relative error of one code's output, by what was compared.
        scaling: largest error of the action's scaling relative to the action's spread.
        differing: what the bundle has otherwise than the reference, one line each: temperature,
            demonstrated ranges, tokens' constants, the causal mask.
        policy: of the whole policy, with the reference's codes forced.
    """

    backend: str
    precision: Precision
    steps: int
    stages: dict[str, StageResult]
    codes: dict[str, float]
    scaling: float
    differing: tuple[str, ...]
    policy: PolicyResult

    @property
    def violations(self) -> list[str]:
        """What breaks the limits, one line each; empty is good."""
        limits, exact = LIMITS[self.precision], LIMITS["fp32"]
        found = self.policy.violations(limits)
        for name, result in self.stages.items():
            own = exact if name in _EXACT else limits.behind(_BEHIND[name])
            found += result.violations(name, own)
        most = limits.behind(2).relative_error * _ONE_CODE
        for name, error in self.codes.items():
            if not error <= most:
                found.append(f"{name} of one code: relative error {error:.3g} is above {most:.3g}")
        if not self.scaling <= exact.action:
            found.append(f"action scaling: error {self.scaling:.3g} of the action's spread")
        return [*found, *self.differing]

    def table(self) -> list[tuple[str, str]]:
        """What was compared, and its figures."""
        rows = [(name, str(result)) for name, result in self.stages.items()]
        policy = self.policy
        action = f"error {policy.action_error:.3g} in its units, of its spread {policy.action:.2e}"
        most = f"in 99 %, {policy.largest_action:.2e} at most"
        codes = f"total variation {policy.total_variation:.2e}, {policy.clear:.0%} clear of ties"
        agree = f"agreement {policy.code_agreement:.2%}"
        return [*rows, ("action", f"{action} {most}"), ("codes", f"{codes}, of those {agree}")]

    def __str__(self) -> str:
        """All figures, one line each."""
        heading = f"{self.backend}, {self.precision}, {self.steps} predictions"
        return "\n".join([heading, *(f"{name}: {figures}" for name, figures in self.table())])


def prove(bundle: Bundle, backend: Backend) -> Proof:
    """Act the reference cases of a bundle with all its files out on a backend; takes a second.

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
    check = PolicyCheck(bundle, backend, cases)
    try:
        for case, prefetch in product(cases.cases, (True, False)):
            observations = cases.observations(case, bundle.manifest)
            check.add(observations, case.outputs, case.clear, prefetch=prefetch)
    finally:
        check.close()
    return check.proof


class PolicyCheck:
    """Acts on a backend with the reference's codes forced, and compares everything on the way.

    The bundle need not have been verified yet, the reference need not have its cases yet.
    """

    def __init__(self, bundle: Bundle, backend: Backend, reference: ReferenceCases) -> None:
        self._bundle, self._backend, self._reference = bundle, backend, reference
        self._actor = self._plain_actor = _Actor(bundle, backend, backend.default_prefetch)
        if self._actor.graphs.can_prefill:  # else both ways are one
            self._plain_actor = _Actor(bundle, backend, "off")
        self._whole = PolicyComparison(reference.spread, reference.temperature)
        self._stages = {name: StageComparison() for name in (*_BEHIND, *_EXACT)}
        self._codes = {"offsets": CodeComparison(), "secondary logits": CodeComparison()}
        self._state = Affine.from_arrays(bundle.arrays, "state", bundle.manifest.state_dim)
        self._columns = secondary_columns(bundle)
        self._action, self._scaling = action_scaling(bundle), np.float64(0)
        table = decode_table(bundle)
        if table is not None and reference.decoded_prints.size:
            self._compare("decode table", prints(table, 2), reference.decoded_prints)

    def add(
        self,
        observations: Iterable[Observation],
        expected: PolicyOutputs,
        clear: NDArray[np.bool_] | None = None,
        *,
        prefetch: bool = True,
    ) -> None:
        """Act through one episode of M observations.

        Args:
            observations: the robot's.
            expected: what the reference computes for them.
            clear: (M,), which of its codes rounding cannot exchange; None decides by what all
                logits move.
            prefetch: work ahead as on a robot that has the time; else as on one that has not,
                which runs other graphs.
        """
        actor = self._actor if prefetch else self._plain_actor
        actor.reset()
        for step, observation in enumerate(observations):
            wanted = PolicyOutputs(*(values[step] for values in expected))
            chunk = actor.act_chunk(observation, codes=wanted.codes)
            logits = self._compare_graphs(actor, wanted)
            marked = None if clear is None else bool(clear[step])
            self._whole.add(chunk, wanted.actions, logits, wanted.logits, clear=marked)
            self._compare_scalings(observation, wanted)

    def _compare_graphs(self, actor: "_Actor", wanted: PolicyOutputs) -> Floats:
        """Every graph's output; returns the logits (2, C) of both layers."""
        decision, read = actor.last, actor.graphs.read
        assert decision is not None  # noqa: S101 - a chunk was just predicted
        rows, offsets = read("logits"), read("offsets")
        logits = np.stack([rows[0], secondary_row(rows, int(wanted.codes[0]), self._columns)])
        self._compare("vision_encoder", read("frame_tokens"), wanted.frame_tokens)
        self._compare("gpt", read("feature"), wanted.feature)
        self._compare("code logits", centred(logits), centred(wanted.logits))
        self._compare("code_heads", decision.offset_chunk, wanted.offset_chunk)
        self._compare("rvq_decoder", decision.decoded_chunk, wanted.decoded_chunk)
        if np.isfinite(wanted.offset_prints).all():  # otherwise it is a bundle of format 2
            self._codes["offsets"].add(prints(offsets, 2), wanted.offset_prints)
            self._codes["secondary logits"].add(prints(centred(rows[1:]), 1), wanted.logit_prints)
        return logits

    def _compare_scalings(self, observation: Observation, wanted: PolicyOutputs) -> None:
        if not np.isfinite(wanted.scaled_states).all():
            return
        state = observation[self._bundle.manifest.state_key]
        if state.size:
            scaled = self._state.apply(state.astype(np.float32))
            self._compare("state scaling", scaled, wanted.scaled_states)
        chunk = wanted.decoded_chunk + wanted.offset_chunk
        errors = action_errors(self._action.apply(chunk, wanted.scaled_states), wanted.actions)
        spread = np.maximum(self._reference.spread, 1e-12)
        self._scaling = np.maximum(self._scaling, (errors / spread).max())

    def _compare(self, name: str, got: NDArray[np.floating], wanted: NDArray[np.floating]) -> None:
        self._stages[name].add(got[None], wanted[None])

    def close(self) -> None:
        """Free the windows, unless one is the backend's last: the backend stays open."""
        for actor in (self._actor, self._plain_actor):
            if len(self._backend.windows) > 1:
                actor.close()

    @property
    def proof(self) -> Proof:
        """The figures so far."""
        return Proof(
            backend=self._backend.name,
            precision=self._bundle.manifest.precision,
            steps=self._whole.steps,
            stages={name: found.result for name, found in self._stages.items()},
            codes={name: found.result for name, found in self._codes.items()},
            scaling=float(self._scaling),
            differing=tuple(_differing(self._bundle, self._reference)),
            policy=self._whole.result,
        )


class _Actor(ActingPolicy):
    """A policy whose graphs can be read."""

    def __init__(self, bundle: Bundle, backend: Backend, prefetch: Prefetch) -> None:
        # Forced codes may leave the limits, and the reference has none; nor for made-up states.
        guards = Guards(action_limits=None, state_limits=(-math.inf, math.inf))
        super().__init__(bundle, backend, prefetch=prefetch, guards=guards)
        self.graphs = self._window.graphs


def _differing(bundle: Bundle, reference: ReferenceCases) -> Iterator[str]:
    """What needs no arithmetic to be compared."""
    temperature = bundle.manifest.policy.bet_softmax_temperature
    if temperature != reference.temperature:
        yield f"temperature: {temperature:g}, the reference's is {reference.temperature:g}"
    if bundle.manifest.format_version == 2:
        return
    for name in CONSTANTS:
        own, wanted = bundle.arrays.get(name), reference.constants.get(name)
        if own is None or wanted is None:
            same = own is wanted
        else:
            same = own.shape == wanted.shape and np.allclose(own, wanted, rtol=1e-5, atol=1e-6)
        if not same:
            yield f"{name}: not what the reference has"
