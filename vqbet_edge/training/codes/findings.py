"""What is healthy about a codebook, and what to change: `vqbet-train`'s flags.

The limits are rules of thumb. Each is one constant, and each finding names the figure it judges.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vqbet_edge.training.codes.report import NO_DIFFERENCE, CodesReport
from vqbet_edge.training.codes.use import LayerUse

Level = Literal["healthy", "notice", "problem"]
LAYERS = ("primary", "secondary")

# A layer with a perplexity below this says next to nothing.
COLLAPSED = 1.5
# Codes that leave more of the demonstrations' spread than this are coarse.
COARSE = 0.4
# So many draws of pairs that no demonstration has are too many.
UNSEEN = 0.05
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
    found = sorted((*_codebook(report), *_predicted(report)), key=lambda f: f.level == "notice")
    if all(finding.level == "notice" for finding in found):
        found.append(_healthy(report))
    return tuple(found)


def _codebook(report: CodesReport) -> Iterator[Finding]:
    layers, source = known_use(report)
    size, lost = report.policy.codes, report.demonstrations
    # Few codes are enough for demonstrations that they reconstruct all the same.
    enough = lost is not None and lost.left_by_both < COARSE
    collapsed = ""
    if report.chunk_spread < NO_DIFFERENCE:
        collapsed = (
            "all code pairs decode to nearly the same chunk (spread "
            f"{report.chunk_spread:.2g} in the network's units)"
        )
    elif layers and layers[0].perplexity < COLLAPSED and not enough:
        collapsed = (
            f"{layers[0].used} of {size} primary codes in use, perplexity "
            f"{layers[0].perplexity:.2f} ({source})"
        )
    if collapsed and size > 1:
        yield Finding(
            "collapsed",
            "problem",
            f"The codebook has collapsed: {collapsed}.",
            "Train phase 1 longer (--n-vqvae-training-steps), which revives dead codes on the way; "
            "look for action dimensions with outliers that leave everything else in a corner of "
            "the range (--normalization-mapping.ACTION QUANTILES); try --optimizer-vqvae-lr 3e-4.",
        )
    for name, layer in zip(LAYERS, layers, strict=False):
        if layer.dead:
            many = len(layer.dead) > MANY_DEAD * size and not enough
            listed = ", ".join(map(str, layer.dead[:12])) + (
                ", ..." if len(layer.dead) > 12 else ""
            )
            yield Finding(
                f"dead_{name}_codes",
                "problem" if many else "notice",
                f"{len(layer.dead)} of {size} {name} codes are dead ({source}): {listed}.",
                "They cost logits and offsets, not accuracy. --vqvae-n-embed "
                f"{max(2, layer.used)} is enough, or train phase 1 longer "
                "(--n-vqvae-training-steps).",
            )
    if lost is not None and not lost.spread.any():
        yield Finding(
            "no_variety",
            "problem",
            f"All {lost.chunks} demonstrated chunks are the same: there is nothing to choose.",
            "Look whether the data set's 'action' is what moved the robot.",
        )
    if lost is not None and lost.left_by_both > COARSE:
        yield Finding(
            "coarse",
            "problem",
            f"The codes are coarse: both together leave {lost.left_by_both:.0%} of the "
            "demonstrations' spread, which the offsets have to make up for.",
            "Train phase 1 longer (--n-vqvae-training-steps), allow more codes (--vqvae-n-embed) "
            "or stand for fewer actions by a pair (--action-chunk-size).",
        )


def known_use(report: CodesReport) -> tuple[tuple[LayerUse, ...], str]:
    """Both layers' use as well as it is known, and where from."""
    if report.demonstrations is not None:
        return report.demonstrations.use.layers, "of all demonstrated chunks"
    if report.training_use is not None:
        return report.training_use, "of the last batches of phase 1"
    return (), ""


def _predicted(report: CodesReport) -> Iterator[Finding]:
    found = report.predictions
    if found is None:
        return
    if found.unseen_share is not None and found.unseen_share > UNSEEN:
        yield Finding(
            "unseen_pairs",
            "problem",
            f"{found.unseen_share:.0%} of the draws are code pairs that no demonstration has: the "
            "two codes of a decision come from different behaviours.",
            "Draw the secondary code knowing the primary one (--sequentially-select), or lower "
            "--bet-softmax-temperature.",
        )
    ratio = found.offset_ratio
    if ratio is None or ratio > 1:
        beside = (
            "The most probable code pair stands for the same chunk at every step"
            if ratio is None
            else f"Offsets are {ratio:.1f} times as large as what choosing a code changes"
        )
        yield Finding(
            "offsets_dominate",
            "problem",
            f"{beside}: the codes do little, and the policy is close to a plain regression.",
            "Lower --offset-loss-weight or raise --primary-code-loss-weight, and train phase 2 "
            "longer (--steps); if the codes are coarse as well, look there first.",
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
    layers, source = known_use(report)
    used = " and ".join(f"{layer.used} {n}" for n, layer in zip(LAYERS, layers, strict=False))
    parts = [f"{used} codes of {report.policy.codes} each are in use ({source})"] if layers else []
    if report.demonstrations is not None:
        left = report.demonstrations.left_by_both
        parts.append(f"they leave {left:.0%} of the demonstrations' spread")
    if report.predictions is not None:
        ratio = report.predictions.offset_ratio
        parts.append(f"offsets are {ratio:.2f} times what a code changes")
    said = "; ".join(parts) or "its chunks differ; more needs --data, or the checkpoint"
    return Finding("healthy", "healthy", f"The codebook is healthy: {said}.")
