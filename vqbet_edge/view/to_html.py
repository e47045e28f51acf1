"""One self-contained page: data and script inside, nothing is fetched.

Its size is bounded: of long recordings the end of an episode is kept, and of frames every n-th.
"""

import base64
import html
import json
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from vqbet_edge.runtime.recording_format import Outcome
from vqbet_edge.runtime.sampling import Decision
from vqbet_edge.view.episodes import ShownEpisode, first_shown
from vqbet_edge.view.images import encode

MAX_FRAME_WIDTH = 320
# Codes of one layer that are drawn: those with the highest mean probability.
MAX_CODES = 24
# Of the page's size, for numbers; about so many bytes stand for one.
_NUMBERS_SHARE, _NUMBER_BYTES = 0.4, 9


class _Cut(NamedTuple):
    """An episode from one of its rows on."""

    shown: ShownEpisode
    first: int

    @property
    def rows(self) -> range:
        return range(self.first, len(self.shown.episode))

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.shown.recording.info.image_keys


class _Frame(NamedTuple):
    episode: int
    row: int
    camera: str
    uri: str


def page(shown: Sequence[ShownEpisode], title: str, max_bytes: int) -> str:
    """The page, open on the first episode that succeeded, where that is known.

    Args:
        shown: episodes in the order of the page.
        title: of the page.
        max_bytes: about how large it may become.
    """
    cuts = list(_cut(shown, int(max_bytes * _NUMBERS_SHARE)))
    episodes = [_episode(cut) for cut in cuts]
    numbers = len(json.dumps(episodes, separators=(",", ":")))
    for frame in _frames(cuts, max_bytes - numbers):
        episodes[frame.episode]["frames"][frame.camera].append([frame.row, frame.uri])
    data = {
        "episodes": episodes,
        "opened": first_shown([cut.shown for cut in cuts]),
        "leftOut": len(shown) - len(cuts),
        "outcomes": [outcome.name for outcome in Outcome],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = files("vqbet_edge.view").joinpath("page.html").read_text("utf-8")
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", text)


def _cut(shown: Sequence[ShownEpisode], max_bytes: int) -> Iterator[_Cut]:
    """As much of every episode as there is room for: its end, which is what one looks for."""
    left = max_bytes
    for one in shown:
        episode = one.episode
        numbers = len(episode) * (episode.actions.shape[1] + episode.states.shape[1] + 3)
        for decision in episode.decisions.values():
            codes = min(decision.code_probabilities.shape[1], MAX_CODES)
            numbers += 2 * codes + decision.action_chunk.size + 16
        each = numbers * _NUMBER_BYTES / len(episode)
        rows = min(len(episode), int(left / each))
        if rows == 0:
            return
        left -= int(rows * each)
        yield _Cut(one, len(episode) - rows)


def _episode(cut: _Cut) -> dict[str, Any]:
    episode, rows = cut.shown.episode, slice(cut.first, None)
    decisions = [(row, d) for row, d in sorted(episode.decisions.items()) if row >= cut.first]
    columns = _codes_to_draw([decision for _, decision in decisions])
    policy = cut.shown.recording.policy
    how = "greedy" if policy.temperature == 0 else f"temperature {policy.temperature:g}"
    return {
        "name": cut.shown.name,
        "about": (
            f"{policy.bundle}, {policy.precision} on {policy.backend}, {how}, seed {policy.seed}, "
            f"{policy.replan_every} actions of each chunk; manifest {policy.manifest_sha256[:12]}"
        ),
        "missing": cut.first,
        "start": int(episode.times[cut.first]) // 1_000_000,
        "steps": episode.steps[rows].tolist(),
        "times": _rounded((episode.times[rows] - episode.times[cut.first]) / 1e9),
        "actions": _rounded(episode.actions[rows]),
        "states": _rounded(episode.states[rows]),
        "milliseconds": _rounded(episode.seconds[rows] * 1e3),
        "outcomes": episode.outcomes[rows].tolist(),
        "marks": [
            [row - cut.first, "; ".join(mark.text for mark in marks)]
            for row, marks in sorted(episode.marks.items())
            if row >= cut.first
        ],
        "codes": [column.tolist() for column in columns],
        "decisions": [
            {
                "row": row - cut.first,
                "codes": d.codes.tolist(),
                "chosen": _rounded(d.code_probabilities[[0, 1], d.codes]),
                "draws": _rounded(d.draws),
                "probabilities": [
                    _rounded(p[c]) for p, c in zip(d.code_probabilities, columns, strict=True)
                ],
                "chunk": _rounded(d.action_chunk),
                "clamped": np.argwhere(d.clamped).tolist(),
                "milliseconds": {k: _rounded(seconds * 1e3) for k, seconds in d.seconds.items()},
            }
            for row, d in decisions
        ],
        "frames": {key: [] for key in cut.cameras},
    }


def _codes_to_draw(decisions: Sequence[Decision]) -> list[np.ndarray[Any, np.dtype[np.intp]]]:
    """Of either layer the most probable codes, in their order."""
    if not decisions:
        return [np.zeros(0, np.intp)] * 2
    means = np.mean([decision.code_probabilities for decision in decisions], axis=0)
    return [np.sort(np.argsort(-mean)[:MAX_CODES]) for mean in means]


def _frames(cuts: Sequence[_Cut], max_bytes: int) -> Iterator[_Frame]:
    """Every n-th row's frames, with n so that they fit."""
    if not cuts:
        return
    rows = sum(len(cut.rows) * len(cut.cameras) for cut in cuts)
    first = cuts[0]
    size = max(len(_uri(first, k, first.rows[len(first.rows) // 2])) for k in first.cameras)
    stride = max(1, math.ceil(rows * size / max(max_bytes, 1)))
    while True:
        frames = [
            _Frame(number, row - cut.first, key, _uri(cut, key, row))
            for number, cut in enumerate(cuts)
            for row in cut.rows[::stride]
            for key in cut.cameras
        ]
        used = sum(len(frame.uri) + 12 for frame in frames)
        if used <= max_bytes or stride >= rows:
            yield from frames
            return
        stride = math.ceil(stride * max(used / max_bytes, 1.1))


def _uri(cut: _Cut, key: str, row: int) -> str:
    data = encode(cut.shown.episode.frame(key, row), "jpeg", MAX_FRAME_WIDTH)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _rounded(values: Any) -> Any:  # noqa: ANN401 - arrays of any depth become lists of that depth
    """Five digits; JSON has no NaN."""
    if isinstance(values, np.ndarray) and values.ndim:
        return [_rounded(value) for value in values]
    return float(f"{values:.5g}") if math.isfinite(values) else None
