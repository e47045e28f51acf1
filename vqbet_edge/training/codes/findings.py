"""What is healthy about a codebook, and what to change: `vqbet-train`'s flags.

The limits are rules of thumb. Each is one constant, and each finding names the figure it judges.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vqbet_edge.training.codes.facts import SAME, CodesReport, Demonstrations, Predictions
from vqbet_edge.training.codes.use import LayerUse

Level = Literal["healthy", "notice", "problem"]
LAYERS = ("primary", "secondary")

# A layer with a perplexity below this says next to nothing.
COLLAPSED = 1.5
# Codes that leave more of the demonstrations' spread than this are coarse.
COARSE = 0.4
# The secondary code does nothing when the error keeps this share of the primary code's.
IDLE = 0.95
# So many draws of pairs that no demonstration has are too many.
UNSEEN = 0.05
# The primary code is hardly learned within this share of the way from majority to always right.
MISSED = 0.25
# Steps with more than one mode are to be the exception.
UNDECIDED = 0.5
# Dead codes matter when they are more than this share of a layer.
MANY_DEAD = 0.25


@dataclass(frozen=True)
class Finding:
    """One sentence about the codes.

    Attributes:
        name: stable, for programs.
        level: how bad it is.
        text: what was found, with its figure.
        change: what to do about it; empty if there is nothing to do.
    """

    name: str
    level: Level
    text: str
    change: str = ""


def judge(report: CodesReport) -> tuple[Finding, ...]:
    """All findings, problems first; where there is none, the last one says what is well."""
    found = [*_codebook(report)]
    if report.demonstrations is not None:
        found += _demonstrated(report.demonstrations)
    if report.predictions is not None:
        found += _predicted(report.predictions)
    found.sort(key=lambda finding: finding.level == "notice")
    if all(finding.level == "notice" for finding in found):
        found.append(_healthy(report))
    return tuple(found)


def _codebook(report: CodesReport) -> Iterator[Finding]:
    layers, source = _use(report)
    dull = _dull(report.demonstrations)
    if report.chunk_spread < SAME and report.policy.codes > 1:
        yield Finding(
            "collapsed",
            "problem",
            "The codebook has collapsed: all code pairs decode to nearly the same chunk (spread "
            f"{report.chunk_spread:.2g} in the network's units).",
            _RETRAIN,
        )
    elif layers and layers[0].perplexity < COLLAPSED and not dull and report.policy.codes > 1:
        yield Finding(
            "collapsed",
            "problem",
            f"The primary codebook has collapsed: {layers[0].used} of {report.policy.codes} codes "
            f"in use, perplexity {layers[0].perplexity:.2f} ({source}).",
            _RETRAIN,
        )
    for name, layer in zip(LAYERS, layers, strict=False):
        if layer.dead:
            yield _dead(name, layer, source, serious=not dull)


_RETRAIN = (
    "Train phase 1 longer (--n-vqvae-training-steps), which revives dead codes on the way; look "
    "for action dimensions with outliers that leave everything else in a corner of the range "
    "(--normalization-mapping.ACTION QUANTILES); try --optimizer-vqvae-lr 3e-4."
)


def _use(report: CodesReport) -> tuple[tuple[LayerUse, ...], str]:
    """Both layers' use as well as it is known, and where from."""
    demonstrated = report.demonstrations
    if demonstrated is not None and demonstrated.use is not None:
        return demonstrated.use.layers, "of all demonstrated chunks"
    if report.training_use is not None:
        return report.training_use, "of the last batches of phase 1"
    return (), ""


def _dull(demonstrations: Demonstrations | None) -> bool:
    """Whether few codes are enough: what is demonstrated is reconstructed all the same."""
    lost = None if demonstrations is None else demonstrations.reconstruction
    return lost is not None and lost.left_by_both < COARSE


def _dead(name: str, layer: LayerUse, source: str, *, serious: bool) -> Finding:
    total, dead = len(layer.counts), len(layer.dead)
    listed = ", ".join(map(str, layer.dead[:12])) + (", ..." if dead > 12 else "")
    many = dead > MANY_DEAD * total and serious
    change = (
        f"They cost logits and offsets, not accuracy. --vqvae-n-embed {max(2, layer.used)} is "
        "enough, or train phase 1 longer (--n-vqvae-training-steps)."
    )
    return Finding(
        f"dead_{name}_codes",
        "problem" if many else "notice",
        f"{dead} of {total} {name} codes are dead ({source}): {listed}.",
        change,
    )


def _demonstrated(found: Demonstrations) -> Iterator[Finding]:
    if not found.spread.any():
        yield Finding(
            "no_variety",
            "problem",
            f"All {found.chunks} demonstrated chunks are the same: there is nothing to choose.",
            "Look whether the data set's 'action' is what moved the robot.",
        )
    lost = found.reconstruction
    if lost is None:
        return
    if lost.left_by_both > COARSE:
        yield Finding(
            "coarse",
            "problem",
            f"The codes are coarse: both together leave {lost.left_by_both:.0%} of the "
            "demonstrations' spread, which the offsets have to make up for.",
            "Train phase 1 longer (--n-vqvae-training-steps), allow more codes (--vqvae-n-embed) "
            "or stand for fewer actions by a pair (--action-chunk-size).",
        )
    if lost.left_by_both > IDLE * lost.left_by_primary and lost.left_by_primary > COARSE / 4:
        yield Finding(
            "idle_secondary",
            "notice",
            f"The secondary code does next to nothing: the primary code alone leaves "
            f"{lost.left_by_primary:.0%} of the spread, both leave {lost.left_by_both:.0%}.",
            "Train phase 1 longer (--n-vqvae-training-steps).",
        )


def _predicted(found: Predictions) -> Iterator[Finding]:
    if found.unseen is not None and found.unseen.share > UNSEEN:
        yield Finding(
            "unseen_pairs",
            "problem",
            f"{found.unseen.share:.0%} of the draws are code pairs that no demonstration has: the "
            "two codes of a decision come from different behaviours.",
            "Draw the secondary code knowing the primary one (--sequentially-select), or lower "
            "--bet-softmax-temperature.",
        )
    if found.confusion is not None:
        primary = found.confusion[0]
        if primary.accuracy - primary.majority < MISSED * (1 - primary.majority):
            yield Finding(
                "missed_primary_codes",
                "problem",
                f"The primary code is predicted right at {primary.accuracy:.0%} of the steps; "
                f"always the most frequent one would be right at {primary.majority:.0%}.",
                "Train phase 2 longer (--steps), and let codes count for more beside offsets: "
                "lower --offset-loss-weight or raise --primary-code-loss-weight.",
            )
    if found.offsets.ratio is None:
        yield Finding(
            "one_choice",
            "problem",
            "The most probable code pair stands for the same chunk at every step: codes decide "
            "nothing, and what the policy does comes from the offsets.",
            "Train phase 2 longer (--steps), and let codes count for more beside offsets: lower "
            "--offset-loss-weight or raise --primary-code-loss-weight.",
        )
    elif found.offsets.ratio > 1:
        yield Finding(
            "offsets_dominate",
            "problem",
            f"Offsets are {found.offsets.ratio:.1f} times as large as what choosing a code "
            "changes: the codes do little, and the policy is close to a plain regression.",
            "Lower --offset-loss-weight; if the codes are coarse as well, look there first.",
        )
    if found.fork_share > UNDECIDED:
        yield Finding(
            "undecided",
            "notice",
            f"More than one mode is live at {found.fork_share:.0%} of the steps: the robot may "
            "change its mind at every prediction.",
            "Lower --bet-softmax-temperature (EdgePolicy.load(temperature=...) tries it without "
            "training), or train phase 2 longer (--steps).",
        )


def _healthy(report: CodesReport) -> Finding:
    layers, source = _use(report)
    used = " and ".join(f"{layer.used} {n}" for n, layer in zip(LAYERS, layers, strict=False))
    parts = [f"{used} codes of {report.policy.codes} each are in use ({source})"] if layers else []
    lost = report.demonstrations and report.demonstrations.reconstruction
    if lost:
        parts.append(f"they leave {lost.left_by_both:.0%} of the demonstrations' spread")
    if report.predictions is not None:
        parts.append(
            f"offsets are {report.predictions.offsets.ratio:.2f} times what a code changes"
        )
    if not parts:
        parts.append("its chunks differ; more needs --data, or the checkpoint")
    return Finding("healthy", "healthy", f"The codebook is healthy: {'; '.join(parts)}.")
