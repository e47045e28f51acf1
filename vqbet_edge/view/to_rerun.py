"""A recording for the Rerun viewer: every figure under its episode, on real time and on steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rerun as rr

from vqbet_edge.runtime.recording_format import DECISION_ARRAYS, Outcome
from vqbet_edge.runtime.sampling import Decision
from vqbet_edge.view.episodes import ShownEpisode
from vqbet_edge.view.images import encode


def write(shown: Sequence[ShownEpisode], path: Path) -> None:
    """Write an .rrd file.

    Under `episode_000` and on, per step: `camera/<key>` (PNG, so that every value stays), `state`,
    `action`, `milliseconds`, `outcome` where it was no plain action. Per decision, under
    `decision`: bars `primary` and `secondary`, every array of `Decision` as a tensor, and
    `seconds/<stage>`.
    """
    stream = rr.RecordingStream("vqbet_edge")
    stream.save(path)
    for place, one in enumerate(shown):
        root = f"episode_{place:03}"
        stream.log(root, rr.TextDocument(one.name), static=True)
        for row in range(len(one.episode)):
            _log_row(stream, root, one, row)
    stream.flush()
    stream.disconnect()


def _log_row(stream: rr.RecordingStream, root: str, shown: ShownEpisode, row: int) -> None:
    episode = shown.episode
    stream.set_time("time", timestamp=np.datetime64(int(episode.times[row]), "ns"))
    stream.set_time("step", sequence=int(episode.steps[row]))
    for key in shown.recording.info.image_keys:
        image = rr.EncodedImage(
            contents=encode(episode.frame(key, row), "png"), media_type="image/png"
        )
        stream.log(f"{root}/camera/{rr.escape_entity_path_part(key)}", image)
    stream.log(f"{root}/state", rr.Scalars(episode.states[row]))
    outcome = Outcome(int(episode.outcomes[row]))
    if outcome is not Outcome.RAISED:
        stream.log(f"{root}/action", rr.Scalars(episode.actions[row]))
        stream.log(f"{root}/milliseconds", rr.Scalars(episode.seconds[row] * 1e3))
    if outcome in {Outcome.LATE, Outcome.RAISED}:
        stream.log(f"{root}/outcome", rr.TextLog(outcome.name, level=rr.TextLogLevel.WARN))
    if row in episode.decisions:
        _log_decision(stream, f"{root}/decision", episode.decisions[row])


def _log_decision(stream: rr.RecordingStream, root: str, decision: Decision) -> None:
    for layer, name in enumerate(("primary", "secondary")):
        stream.log(f"{root}/{name}", rr.BarChart(decision.code_probabilities[layer]))
    for name in DECISION_ARRAYS:
        values = getattr(decision, name)
        # Tensors have no truth values.
        tensor = values.astype(np.uint8) if values.dtype == bool else values
        stream.log(f"{root}/{name}", rr.Tensor(tensor))
    for stage, seconds in decision.seconds.items():
        stream.log(f"{root}/seconds/{stage}", rr.Scalars(seconds))
