"""A recording as MCAP, for Foxglove and whatever else reads it: JSON messages with schemas."""

import base64
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from mcap.writer import Writer

from vqbet_edge.runtime.recording_format import DECISION_ARRAYS, Outcome
from vqbet_edge.view.episodes import ShownEpisode
from vqbet_edge.view.images import encode

_INTEGER = {"type": "integer"}
_TIMESTAMP = {
    "type": "object",
    "title": "time",
    "properties": {"sec": _INTEGER, "nsec": _INTEGER},
}
_NUMBERS = {"type": "array", "items": {"type": ["number", "null"]}}
# Name -> properties of its JSON schema. The first is Foxglove's, so that its image panel shows it.
SCHEMAS: dict[str, dict[str, Any]] = {
    "foxglove.CompressedImage": {
        "timestamp": _TIMESTAMP,
        "frame_id": {"type": "string"},
        "data": {"type": "string", "contentEncoding": "base64"},
        "format": {"type": "string"},
    },
    "vqbet_edge.Step": {
        "step": _INTEGER,
        "state": _NUMBERS,
        "action": _NUMBERS,
        "seconds": {"type": ["number", "null"]},
        "outcome": {"enum": [outcome.name for outcome in Outcome]},
    },
    "vqbet_edge.Mark": {"step": _INTEGER, "text": {"type": "string"}},
    "vqbet_edge.Decision": {
        "step": _INTEGER,
        **{name: {"type": "array"} for name in DECISION_ARRAYS},
        "seconds": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_Send = Callable[[str, str, Any, int, int], None]


def write(shown: Sequence[ShownEpisode], path: Path) -> None:
    """Write an .mcap file.

    Topics `/episode_000/...` and on: `camera/<key>` (foxglove.CompressedImage, PNG, so that every
    value stays), `step` with state, action, seconds and outcome, `decision` with the fields of
    `Decision`, `mark` with a text. The log time is when the observation came, a mark's its own.
    """
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start(library="vqbet_edge")
        schemas = {}
        for name, properties in SCHEMAS.items():
            schema = {"title": name, "type": "object", "properties": properties}
            schemas[name] = writer.register_schema(name, "jsonschema", json.dumps(schema).encode())
        channels: dict[str, int] = {}

        def send(topic: str, schema: str, message: Any, time: int, sequence: int) -> None:  # noqa: ANN401
            if topic not in channels:
                channels[topic] = writer.register_channel(topic, "json", schemas[schema])
            data = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
            writer.add_message(channels[topic], time, data, time, sequence)

        for place, one in enumerate(shown):
            about = {
                "name": one.name,
                "recording": msgspec.json.encode(one.recording.info).decode(),
            }
            writer.add_metadata(f"episode_{place:03}", about)
            for row in range(len(one.episode)):
                _send_row(send, f"/episode_{place:03}", one, row)
        writer.finish()


def _send_row(send: _Send, root: str, shown: ShownEpisode, row: int) -> None:
    episode = shown.episode
    time, step = int(episode.times[row]), int(episode.steps[row])
    seconds, nanoseconds = divmod(time, 1_000_000_000)
    for key in shown.recording.info.image_keys:
        image = {
            "timestamp": {"sec": seconds, "nsec": nanoseconds},
            "frame_id": key,
            "data": base64.b64encode(encode(episode.frame(key, row), "png")).decode(),
            "format": "png",
        }
        send(f"{root}/camera/{key}", "foxglove.CompressedImage", image, time, step)
    message = {
        "step": step,
        "state": _plain(episode.states[row]),
        "action": _plain(episode.actions[row]),
        "seconds": _plain(episode.seconds[row]),
        "outcome": Outcome(int(episode.outcomes[row])).name,
    }
    send(f"{root}/step", "vqbet_edge.Step", message, time, step)
    for mark in episode.marks.get(row, ()):
        text = {"step": step, "text": mark.text}
        send(f"{root}/mark", "vqbet_edge.Mark", text, mark.time, step)
    if row in episode.decisions:
        decision = episode.decisions[row]
        arrays = {name: _plain(getattr(decision, name)) for name in DECISION_ARRAYS}
        message = {"step": decision.step, **arrays, "seconds": decision.seconds}
        send(f"{root}/decision", "vqbet_edge.Decision", message, time, step)


def _plain(values: Any) -> Any:  # noqa: ANN401 - arrays of any depth become lists of that depth
    """Exactly the same values; JSON has no NaN, so that becomes null."""
    if isinstance(values, np.ndarray):
        return [_plain(value) for value in values]
    value = values.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
