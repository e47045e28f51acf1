"""`vqbet-eval --replay`: a recording's decisions made again by another policy.

Every recorded decision is made again on the recorded observations with the recorded random
numbers, so a policy that computes the same decides the same.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.sampling import Decision
from vqbet_edge.training.evaluation.differences import TOLERANCES, Change, Difference, Tolerance
from vqbet_edge.training.evaluation.replayers import Replayer, load_replayer
from vqbet_edge.view.episodes import ShownEpisode, open_episodes


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        folder: of the recording.
        recorded, replayed: what was compared with what.
        tolerance: what is taken for rounding: that of the less precise of both.
        decisions: that were made again.
        skipped: that were not, because their window was not recorded whole.
        differing: that came out differently, near ties not counted.
        near_ties: whose codes rounding can have exchanged.
        largest_probability: largest change of a probability, of all decisions.
        largest_action: largest change of a chunk relative to its range, where codes agree.
        first: the first that differs, None if there is none.
        first_near_tie: likewise.
    """

    folder: str
    recorded: str
    replayed: str
    tolerance: Tolerance
    decisions: int
    skipped: int
    differing: int
    near_ties: int
    largest_probability: float
    largest_action: float
    first: Difference | None
    first_near_tie: Difference | None

    def __str__(self) -> str:
        """For people."""
        probability, action = self.tolerance
        text = f"""\
{self.folder}: {self.decisions} decisions
  recorded        {self.recorded}
  replayed        {self.replayed}
  probabilities   changed by {self.largest_probability:.2g} at most; {probability:g} is rounding
  actions         changed by {self.largest_action:.2g} of their range at most where codes agree; \
{action:g} is rounding
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
        DatasetError: it is no recording with decisions, or lacks what the policy observes.
        UsageError: the policy's chunks or codebooks have other sizes.
        BundleError, CheckpointError, BackendError: the policy cannot be loaded.
    """
    shown = open_episodes(folder)
    info = shown[0].recording.policy
    replayer = load_replayer(source, backend, info.temperature)
    facts = replayer.facts
    precision = max(info.precision, facts.precision, key=list(TOLERANCES).index)
    run = _Run(replayer, TOLERANCES[precision])
    for one in shown:
        run.add(one)
    ties = [one for one in run.differences if one.near_tie]
    differing = [one for one in run.differences if not one.near_tie]
    return Replay(
        folder=str(folder),
        recorded=f"{info.bundle}, {info.precision} on {info.backend}",
        replayed=f"{source}, {facts.precision} on {facts.runs_on}",
        tolerance=TOLERANCES[precision],
        decisions=run.decisions,
        skipped=run.skipped,
        differing=len(differing),
        near_ties=len(ties),
        largest_probability=run.largest_probability,
        largest_action=run.largest_action,
        first=differing[0] if differing else None,
        first_near_tie=ties[0] if ties else None,
    )


class _Run:
    """Figures that run along with the episodes."""

    def __init__(self, replayer: Replayer, tolerance: Tolerance) -> None:
        self._replayer, self._tolerance = replayer, tolerance
        self.decisions = self.skipped = 0
        self.largest_probability = self.largest_action = 0.0
        self.differences: list[Difference] = []

    def add(self, shown: ShownEpisode) -> None:
        """Replay one episode."""
        episode, replayer = shown.episode, self._replayer
        _check_observation(shown, replayer)
        replayer.begin()
        for row in range(len(episode)):
            replayer.see(episode.observation(row))
            decision = episode.decisions.get(row)
            if decision is None:
                continue
            if episode.history_is_whole(row, replayer.facts.n_obs_steps):
                self._compare(shown, row, decision)
            else:
                self.skipped += 1

    def _compare(self, shown: ShownEpisode, row: int, recorded: Decision) -> None:
        facts, policy = self._replayer.facts, shown.recording.policy
        now = self._replayer.decide(recorded.draws)
        change = Change.between(recorded, now, policy, facts.action_scale)
        self.decisions += 1
        # NumPy's maximum, unlike Python's max, keeps a NaN.
        self.largest_probability = float(np.maximum(self.largest_probability, change.probability))
        if change.same_codes:
            self.largest_action = float(np.maximum(self.largest_action, change.relative_action))
        if change.is_rounding(self._tolerance):
            return
        # The first observation of an episode fills the window.
        rows = [max(0, row - back) for back in reversed(range(facts.n_obs_steps))]
        self.differences.append(
            Difference(
                episode=shown.name,
                step=recorded.step,
                change=change,
                near_tie=change.is_near_tie(self._tolerance),
                window=shown.episode.steps[rows].tolist(),
                states=shown.episode.states[rows].tolist(),
            )
        )


def _check_observation(shown: ShownEpisode, replayer: Replayer) -> None:
    expected = replayer.facts.shapes
    got = {key: array.shape for key, array in shown.episode.observation(0).items()}
    if any(got.get(key) != shape for key, shape in expected.items()):
        raise DatasetError(
            f"the policy observes {expected}, the recording '{shown.recording.folder}' has {got}; "
            "replay a policy of the same robot"
        )
