"""The report as one HTML page: no script, nothing from elsewhere, readable on a phone."""

import base64
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from vqbet_edge.training.codes import figures
from vqbet_edge.training.codes.facts import CodesReport, Demonstrations, Pair, Predictions
from vqbet_edge.training.codes.findings import LAYERS, Finding
from vqbet_edge.training.codes.use import LayerUse, Use

# So many episodes' entropies are drawn.
TRACES = 6
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Codes of {name}</title>
<style>
body {{ margin: 0 auto; max-width: 68rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: #1d242b; background: #fff; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.4rem; margin: 0; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p {{ margin: .4rem 0; max-width: 46rem; }}
.quiet, figcaption {{ color: #556270; font-size: .85rem; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; align-items: start; }}
figure {{ margin: 0; min-width: 0; }}
.plots img {{ width: 100%; height: auto; display: block; }}
.chunks {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr));
  gap: .5rem; }}
.chunks figcaption {{ text-align: center; line-height: 1.2; font-size: .75rem; }}
.chunks .unseen rect {{ fill: #fbeaea; }}
.finding {{ border-left: 4px solid #3c8d4f; padding: .3rem .8rem; margin: .6rem 0;
  background: #f5f7f9; }}
.notice {{ border-color: #d9822b; }}
.problem {{ border-color: #c23b3b; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }}
th, td {{ text-align: right; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #e2e6ea; }}
th:first-child {{ text-align: left; }}
</style>
</head>
<body>
"""


def render(report: CodesReport, findings: Sequence[Finding]) -> str:
    """The page."""
    parts = [
        _HEAD.format(name=escape(report.policy.name)),
        *_top(report, findings),
        *_use(report),
        *_demonstrations(report.demonstrations),
        *_predictions(report.predictions),
        *_motion(report),
        *_chunks(report),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _top(report: CodesReport, findings: Sequence[Finding]) -> Iterator[str]:
    facts = report.policy
    yield f"<h1>Codes of {escape(facts.name)}</h1>"
    drawn = "the secondary code knowing the primary one" if facts.sequential else "both at once"
    yield (
        f'<p class="quiet">{facts.kind}; 2 layers of {facts.codes} codes; a pair stands for '
        f"{facts.chunk} actions of {facts.action_dim} dimensions; drawn at temperature "
        f"{facts.temperature:g}, {drawn}. Data: {escape(report.data or 'none')}.</p>"
    )
    for finding in findings:
        change = f"<br>{escape(finding.change)}" if finding.change else ""
        yield (
            f'<div class="finding {finding.level}"><strong>{finding.level}</strong> '
            f"{escape(finding.text)}{change}</div>"
        )


def _use(report: CodesReport) -> Iterator[str]:
    found, predictions = report.demonstrations, report.predictions
    use, words = None if found is None else found.use, "All demonstrated chunks."
    if use is None and predictions is not None:
        use, words = predictions.use, "The most probable codes of all predictions."
    layers = report.training_use if use is None else use.layers
    if layers is None:
        return
    if use is None:
        words = (
            "From the moving counts at the end of phase 1, which know its last batches only; "
            "with --data it is counted."
        )
    yield "<h2>Use</h2>"
    yield _text(words)
    yield _use_table(layers, use)
    plots = [_plot(figures.use(layers), "How often each code is used.")]
    unseen = None if predictions is None else predictions.unseen
    if unseen is not None:
        yield _text(
            f"{unseen.share:.2%} of the draws are pairs that no demonstration has; "
            f"{len(unseen.pairs)} of them are drawn more often than once in a thousand predictions."
        )
    if use is not None:
        crossed = () if unseen is None else unseen.pairs
        caption = "How often each pair is used" + (
            ". Crosses: drawn, but in no demonstration." if unseen is not None else "."
        )
        plots.append(_plot(figures.pairs(use.pair_counts, crossed), caption))
    yield _plots(plots)


def _use_table(layers: tuple[LayerUse, LayerUse], use: Use | None) -> str:
    rows = [
        (
            name,
            str(layer.used),
            f"{layer.perplexity:.1f}",
            _listed(layer.dead),
            str(len(layer.counts)),
        )
        for name, layer in zip(LAYERS, layers, strict=True)
    ]
    if use is not None:
        pairs = str(use.pair_counts.size)
        rows.append(("pairs", str(use.pairs), f"{use.pair_perplexity:.1f}", "", pairs))
    return _table(("", "used", "perplexity", "dead codes", "of"), rows)


def _listed(codes: Sequence[int]) -> str:
    return ", ".join(map(str, codes)) or "none"


def _demonstrations(found: Demonstrations | None) -> Iterator[str]:
    if found is None or found.reconstruction is None:
        return
    lost = found.reconstruction
    yield "<h2>Reconstruction</h2>"
    yield _text(
        f"Mean absolute error over {found.chunks} demonstrated chunks, in the action's own units. "
        f"Of the spread around the mean chunk, the primary code alone leaves "
        f"{lost.left_by_primary:.0%}, both codes leave {lost.left_by_both:.0%}."
    )
    yield _table(
        ("action", "spread", "primary only", "both"),
        [
            (str(i), *(f"{value:.4g}" for value in row))
            for i, row in enumerate(zip(found.spread, lost.primary, lost.both, strict=True))
        ],
    )
    plots = [_plot(figures.reconstruction(found, lost), "1: no better than the mean chunk.")]
    if found.transitions is not None:
        caption = "Which code follows which in the demonstrations; a chunk executed whole."
        plots.append(_plot(figures.transitions(found.transitions), caption))
    yield _plots(plots)


def _predictions(found: Predictions | None) -> Iterator[str]:
    if found is None:
        return
    yield "<h2>Decisions</h2>"
    yield _text(
        f"Predicted at {found.steps} steps of {len(found.episodes)} episodes. Pairs whose chunks "
        f"differ by less than {found.tolerance:.2g} (root mean square, in the network's units) "
        "are one mode; a mode is live at a probability of 10 %."
    )
    yield _text(
        f"Mean entropy {found.pair_entropy:.2f} nats over code pairs, {found.mode_entropy:.2f} "
        f"over modes; the distribution forks at {found.fork_share:.1%} of the steps."
    )
    yield _text(
        "Entropy along episodes, in nats: blue of the modes, grey of the code pairs. Shaded: "
        "decision points, where more than one mode is live. Dotted: ln 2, two equal ways."
    )
    shown = found.episodes[:TRACES]
    yield _plots([_plot(figures.trace(e), f"Episode {e.episode}.") for e in shown])
    ratio = found.offsets.ratio
    beside = "codes change nothing" if ratio is None else f"offsets are {ratio:.2f} times as large"
    plots = [
        _plot(
            figures.offsets(found.offsets),
            "Is the code doing anything? Per step, what choosing the code changed and what the "
            f"offset added: {beside} (mean absolute values, the network's units).",
        )
    ]
    if found.confusion is not None:
        caption = "True codes of the demonstrated chunk against the most probable ones."
        plots.append(_plot(figures.confusion(found.confusion), caption))
    else:
        caption = "Which most probable code follows which, one chunk later."
        plots.append(_plot(figures.transitions(found.transitions), caption))
    yield _plots(plots)
    yield from _errors(found)


def _errors(found: Predictions) -> Iterator[str]:
    rows = [("mean offset", found.offsets.in_units)]
    if found.errors is not None:
        rows += [
            ("error of the decoded chunk", found.errors.decoded),
            ("error with the offset", found.errors.with_offset),
        ]
    head = ("action", *(str(i) for i in range(len(found.offsets.in_units))))
    yield _table(head, [(name, *(f"{v:.4g}" for v in values)) for name, values in rows])


def _motion(report: CodesReport) -> Iterator[str]:
    if not report.pairs or report.pairs[0].reversals is None:
        return
    yield "<h2>Motion</h2>"
    caption = (
        "Jerk (third difference of the actions, root mean square, the network's units) and "
        "reversals of direction per decoded chunk, most used pairs first. Dashed: mean of the "
        "demonstrations."
    )
    yield _plots([_plot(figures.motion(report.pairs, report.demonstrations), caption)])


def _chunks(report: CodesReport) -> Iterator[str]:
    if not report.pairs:
        return
    chunks = np.concatenate([pair.chunk for pair in report.pairs])
    low, high = chunks.min(axis=0), chunks.max(axis=0)
    yield f"<h2>{len(report.pairs)} code pairs</h2>"
    way = "the path of both action dimensions from the large dot on, the cross at zero"
    lines = "a line per action dimension, over time"
    yield _text(
        f"The decoded chunk of every pair, {way if len(low) == 2 else lines}; primary and "
        "secondary code, and its share of the demonstrated chunks or, where there are none, of "
        "the predictions. Red: drawn, but in no demonstration."
    )
    total = sum(pair.count or 0 for pair in report.pairs)
    yield '<div class="chunks">'
    for pair in report.pairs:
        kind = ' class="unseen"' if pair.count == 0 else ""
        caption = f"{pair.primary}·{pair.secondary} {_share(pair, total)}"
        picture = figures.chunk(pair, low, high)
        yield f"<figure{kind}>{picture}<figcaption>{caption}</figcaption></figure>"
    yield "</div>"


def _share(pair: Pair, total: int) -> str:
    share = pair.count / total if pair.count and total else pair.drawn
    return "" if share is None else f"{share:.1%}"


def _text(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def _plot(svg: str, caption: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _plots(plots: Sequence[str]) -> str:
    return '<div class="plots">' + "\n".join(plots) + "</div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        first, *others = map(escape, cells)
        data = "".join(f"<{kind}>{cell}</{kind}>" for cell in others)
        return f"<tr><th>{first}</th>{data}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="table"><table>\n{row(head, "th")}\n{body}\n</table></div>'
