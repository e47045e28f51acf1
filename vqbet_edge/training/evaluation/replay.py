"""`vqbet-eval --replay`: a recording's decisions made again by another policy.

Every recorded decision is made again on the recorded observations, its codes forced as in a proof:
so chunks can be compared whatever would have been drawn, and what the recorded random numbers draw
now tells which codes would have been.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.comparison import action_errors
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.manifest import Manifest, Precision
from vqbet_edge.runtime.planning import action_scaling
from vqbet_edge.runtime.sampling import Decision, draw_code
from vqbet_edge.training.backend import load_backend
from vqbet_edge.view.episodes import ShownEpisode, open_episodes


class Tolerance(NamedTuple):
    """What a precision may change.

    Attributes:
        probability: total variation of one layer's codes.
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
class Difference:
    """A decision that came out differently.

    Attributes:
        episode: name of the episode.
        step: of the decision, from 0 at the reset.
        recorded: the code pair.
        replayed: what the recorded random numbers draw now, the secondary code given the recorded
            primary one.
        probability: total variation of a layer's codes, the larger one.
        actions: (A,), largest change of the chunk in every dimension, in the robot's units.
        window: steps of the observations that it was decided on, the oldest first.
        states: (N, S), of that window, in the robot's units.
    """

    episode: str
    step: int
    recorded: list[int]
    replayed: list[int]
    probability: float
    actions: list[float]
    window: list[int]
    states: list[list[float]]

    def lines(self) -> Iterator[str]:
        """For people."""
        actions = ", ".join(f"{value:.4g}" for value in self.actions)
        yield f"{self.episode}, step {self.step}"
        yield f"  codes           {self.recorded} recorded, {self.replayed} now"
        yield f"  probability     changed by {self.probability:.2g} at most"
        yield f"  action          changed by [{actions}] at most, in the robot's units"
        yield f"  window          steps {self.window[0]} to {self.window[-1]}, states:"
        for step, state in zip(self.window, self.states, strict=True):
            yield f"    {step:>6}  " + ", ".join(f"{value:.5g}" for value in state)


@dataclass
class Replay:
    """What a replay found.

    Attributes:
        folder: of the recording.
        recorded, replayed: what was compared with what.
        tolerance: what is taken for rounding: that of the less precise of both.
        decisions: that were made again.
        skipped: that were not, because their window was not recorded whole.
        differing: that came out differently by more than rounding.
        near_ties: that did not, but whose codes rounding exchanges.
        largest_probability: largest change of a layer's codes, of all decisions.
        largest_action: largest change of a chunk relative to its range.
        first: the first that differs, None if there is none.
        first_near_tie: likewise.
    """

    folder: str
    recorded: str
    replayed: str
    tolerance: Tolerance
    decisions: int = 0
    skipped: int = 0
    differing: int = 0
    near_ties: int = 0
    largest_probability: float = 0.0
    largest_action: float = 0.0
    first: Difference | None = None
    first_near_tie: Difference | None = None

    def __str__(self) -> str:
        """For people."""
        probability, action = self.tolerance
        text = f"""\
{self.folder}: {self.decisions} decisions
  recorded        {self.recorded}
  replayed        {self.replayed}
  probabilities   changed by {self.largest_probability:.2g} at most; {probability:g} is rounding
  actions         changed by {self.largest_action:.2g} of a range at most; {action:g} is rounding
  differing       {self.differing}
  near ties       {self.near_ties}"""
        if self.skipped:
            text += f"\n  not replayed    {self.skipped}, their windows were not recorded whole"
        for what, one in (("first", self.first), ("first near tie", self.first_near_tie)):
            if one is not None:
                text += "\n" + "\n".join([f"{what} that differs:", *one.lines()])
        return text


def replay(folder: Path, source: str, backend: BackendName) -> Replay:
    """Make a recording's decisions again.

    Args:
        folder: a recording, or what `vqbet-eval --record` wrote.
        source: a bundle or a checkpoint.
        backend: who runs a bundle.

    Raises:
        DatasetError: it is no recording with decisions.
        ObservationError: it lacks what the policy observes.
        UsageError: the policy's chunks or codebooks have other sizes.
        BundleError, CheckpointError, BackendError: the policy cannot be loaded.
    """
    shown = open_episodes(folder)
    info = shown[0].recording.policy
    bundle, loaded = load_backend(source, backend)
    manifest, guards = bundle.manifest, Guards(action_limits=info.action_limits)
    precision = max(info.precision, manifest.precision, key=list(TOLERANCES).index)
    found = Replay(
        folder=str(folder),
        recorded=f"{info.bundle}, {info.precision} on {info.backend}",
        replayed=f"{source}, {manifest.precision} on {loaded.name}",
        tolerance=TOLERANCES[precision],
    )
    action_range = 2 * np.abs(action_scaling(bundle).affine.multiply)
    with EdgePolicy(
        bundle, loaded, temperature=info.temperature, prefetch="off", guards=guards
    ) as policy:
        for one in shown:
            _add(found, one, policy, action_range)
    return found


def _add(
    found: Replay, shown: ShownEpisode, policy: EdgePolicy, action_range: npt.NDArray[np.float32]
) -> None:
    """Replay one episode."""
    episode, window = shown.episode, policy.manifest.policy.n_obs_steps
    policy.reset()
    for row in range(len(episode)):
        recorded = episode.decisions.get(row)
        if recorded is None:
            policy.act(episode.observation(row))
            continue
        _check_sizes(recorded, policy.manifest)
        chunk = policy.act_chunk(episode.observation(row), codes=recorded.codes)
        if not episode.history_is_whole(row, window):
            found.skipped += 1
            continue
        assert policy.last is not None  # noqa: S101 - a chunk was just predicted
        now, before = policy.last.code_probabilities, recorded.code_probabilities
        probability = float(np.abs(now - before).sum(axis=-1).max()) / 2
        actions = action_errors(chunk, recorded.action_chunk).max(axis=0)
        action = float((actions / action_range).max())
        found.decisions += 1
        # NumPy's maximum, unlike Python's max, keeps a NaN.
        found.largest_probability = float(np.maximum(found.largest_probability, probability))
        found.largest_action = float(np.maximum(found.largest_action, action))
        greedy = shown.recording.policy.temperature == 0
        would_be = [_drawn(codes, recorded, greedy=greedy) for codes in (before, now)]
        # Written so that NaN is more than rounding.
        rounding = probability <= found.tolerance.probability and action <= found.tolerance.action
        if rounding and would_be[0] == would_be[1]:
            continue
        rows = np.arange(row + 1 - window, row + 1).clip(0)
        difference = Difference(
            episode=shown.name,
            step=recorded.step,
            recorded=recorded.codes.tolist(),
            replayed=would_be[1],
            probability=probability,
            actions=actions.tolist(),
            window=episode.steps[rows].tolist(),
            states=episode.states[rows].tolist(),
        )
        if rounding:
            # Their distributions are within rounding, so the random numbers are near another code.
            found.near_ties += 1
            found.first_near_tie = found.first_near_tie or difference
        else:
            found.differing += 1
            found.first = found.first or difference


def _drawn(
    probabilities: npt.NDArray[np.float64], decision: Decision, *, greedy: bool
) -> list[int]:
    if greedy:
        codes: list[int] = probabilities.argmax(axis=-1).tolist()
        return codes
    return [draw_code(*layer) for layer in zip(probabilities, decision.draws, strict=True)]


def _check_sizes(recorded: Decision, manifest: Manifest) -> None:
    policy = manifest.policy
    sizes = policy.action_chunk_size, manifest.action_dim, policy.vqvae_n_embed
    before = (*recorded.action_chunk.shape, recorded.code_probabilities.shape[1])
    if before != sizes:
        raise UsageError(
            f"the recorded policy has chunks and codes of sizes {before}, this one {sizes}; "
            "replay a policy of the same configuration"
        )
