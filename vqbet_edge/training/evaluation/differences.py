"""When two decisions on the same window differ, and by how much."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.recording_format import PolicyInfo
from vqbet_edge.runtime.sampling import Decision
from vqbet_edge.training.evaluation.replayers import Redecided


class Tolerance(NamedTuple):
    """What a precision may change.

    Attributes:
        probability: of one code.
        action: relative to its range.
    """

    probability: float
    action: float


# FP32's are the export's limits. FP16's are about three times what two trained policies
# showed (bench/results/int8). INT8 has rare outliers beyond these, and they are worth looking at.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-3, 1e-4),
    "fp16": Tolerance(0.03, 2e-3),
    "int8": Tolerance(0.25, 0.05),
}


@dataclass(frozen=True)
class Change:
    """How far a decision is from the recorded one.

    Attributes:
        recorded, replayed: the code pairs.
        probability: largest change of one code's probability; of the secondary codes only where
            the primary ones agree.
        actions: (A,), largest change of the chunk in every dimension, in the robot's units.
        relative_action: the largest of them, relative to its range.
        margin: how far, as a probability, the recorded random number was from another code, in the
            layer that differs first; of a greedy policy, half the code's lead.
    """

    recorded: list[int]
    replayed: list[int]
    probability: float
    actions: list[float]
    relative_action: float
    margin: float

    @classmethod
    def between(
        cls,
        recorded: Decision,
        now: Redecided,
        policy: PolicyInfo,
        action_scale: npt.NDArray[np.float32],
    ) -> "Change":
        """Compare.

        Args:
            recorded: a decision of `policy`.
            now: what came of the same window and random numbers.
            policy: whose limits on actions hold for both.
            action_scale: (A,), what 1 of a normalised action is in the robot's units.

        Raises:
            UsageError: they are decisions of policies with other sizes.
        """
        _check_sizes(recorded, now)
        same = recorded.codes == now.codes
        changes = np.abs(now.probabilities - recorded.code_probabilities)
        chunk = now.chunk.astype(np.float64)
        if policy.action_limits is not None:
            low, high = np.asarray(policy.action_limits, np.float32)
            chunk = chunk.clip(low, high)
        actions = np.abs(chunk - recorded.action_chunk).max(axis=0)
        return cls(
            recorded=recorded.codes.tolist(),
            replayed=now.codes.tolist(),
            probability=float(changes[: 2 if same[0] else 1].max()),
            actions=actions.tolist(),
            relative_action=float((actions / (2 * action_scale)).max()),
            margin=_margin(recorded, int(np.argmin(same)), greedy=policy.temperature == 0),
        )

    @property
    def same_codes(self) -> bool:
        """Whether the codes agree."""
        return self.recorded == self.replayed

    def is_rounding(self, tolerance: Tolerance) -> bool:
        """Whether it is no more than rounding. Written so that NaN is more."""
        small = self.probability <= tolerance.probability
        return small and self.same_codes and self.relative_action <= tolerance.action

    def is_near_tie(self, tolerance: Tolerance) -> bool:
        """Whether the codes differ, and rounding can have exchanged them."""
        small = self.probability <= tolerance.probability
        return small and not self.same_codes and self.margin <= tolerance.probability


@dataclass(frozen=True)
class Difference:
    """A decision that came out differently.

    Attributes:
        episode: name of the episode.
        step: of the decision, from 0 at the reset.
        change: by how much.
        near_tie: whether rounding can have exchanged its codes.
        window: steps of the observations that it was decided on, the oldest first.
        states: (N, S), of that window, in the robot's units.
    """

    episode: str
    step: int
    change: Change
    near_tie: bool
    window: list[int]
    states: list[list[float]]

    def lines(self) -> Iterator[str]:
        """For people."""
        change = self.change
        actions = ", ".join(f"{value:.4g}" for value in change.actions)
        yield f"{self.episode}, step {self.step}"
        yield f"  codes           {change.recorded} recorded, {change.replayed} now"
        yield f"  probability     changed by {change.probability:.2g} at most"
        yield f"  action          changed by [{actions}] at most, in the robot's units"
        if not change.same_codes:
            what = ", a near tie: rounding decides" if self.near_tie else ""
            yield f"  another code    was {change.margin:.2g} of probability away{what}"
        yield f"  window          steps {self.window[0]} to {self.window[-1]}, states:"
        for step, state in zip(self.window, self.states, strict=True):
            yield f"    {step:>6}  " + ", ".join(f"{value:.5g}" for value in state)


def _check_sizes(recorded: Decision, now: Redecided) -> None:
    before = recorded.action_chunk.shape, recorded.code_probabilities.shape
    after = now.chunk.shape, now.probabilities.shape
    if before != after:
        raise UsageError(
            f"the recorded policy has chunks and codes of shapes {before}, this one {after}; "
            "replay a policy of the same configuration"
        )


def _margin(decision: Decision, layer: int, *, greedy: bool) -> float:
    """How much probabilities must change for another code to be taken."""
    probabilities, code = decision.code_probabilities[layer], int(decision.codes[layer])
    if greedy:
        lead = probabilities[code] - np.delete(probabilities, code).max(initial=0.0)
        return abs(float(lead)) / 2
    edges = np.append(0.0, probabilities.cumsum())
    place = decision.draws[layer] * edges[-1]
    # There is no code below the first and none above the last.
    sides = [place - edges[code]] if code else []
    sides += [edges[code + 1] - place] if code + 1 < len(probabilities) else []
    return abs(float(min(sides, default=1.0)))
