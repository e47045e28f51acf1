"""What a recording is: a folder of safetensors files; docs/recording.md draws it.

Each file, `observations_000000.safetensors` and on, holds consecutive observations, the *rows*:

    episode                  int64   (T,)            grows by one at every reset and behind a gap
    step                     int64   (T,)            observations since the reset, from 0
    <camera key>             uint8   (T, H, W, 3)
    <state key>              float32 (T, S)          in the robot's units

With decisions, every row also has

    time                     int64   (T,)            when it came, ns since 1970; never jumps
    observation_time         int64   (T,)            when it was taken, likewise; 0 where not known
    action                   float32 (T, A)          what was handed out; NaN where `act` raised
    seconds                  float64 (T,)            that `act` took; NaN where it raised
    outcome                  uint8   (T,)            see `Outcome`

and D of the rows have a decision, which `decision.episode` and `decision.step` name:

    decision.<field>         (D, ...)                the fields of `Decision`
    decision.seconds.<stage> float64 (D,)            NaN where that stage had not run yet

The file's metadata has `recording`, the JSON of `RecordingInfo`, and, where something was marked,
`marks`, that of a list of `Mark`.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from vqbet_edge.runtime.manifest import Positive, Precision, Sha256, Text
from vqbet_edge.runtime.sampling import Decision

FORMAT_VERSION: Literal[2] = 2
FILE_PATTERN = "observations_*.safetensors"
METADATA, MARKS = "recording", "marks"
#: A recording's own columns, beside those of features.
OWN = EPISODE, STEP, TIME, OBSERVATION_TIME, ACTION, SECONDS, OUTCOME = (
    *("episode", "step", "time", "observation_time", "action", "seconds", "outcome"),
)
DECISION = "decision."
DECISION_EPISODE, DECISION_STEP = f"{DECISION}{EPISODE}", f"{DECISION}{STEP}"
STAGE_SECONDS = f"{DECISION}{SECONDS}."
#: Fields of `Decision` that are arrays.
DECISION_ARRAYS = (
    *("codes", "code_probabilities", "draws", "decoded_chunk", "offset_chunk", "action_chunk"),
    "clamped",
)

Array = NDArray[Any]
Columns = Mapping[str, tuple[str, tuple[int, ...]]]
Limit = Annotated[tuple[float, ...], Meta(max_length=4096)]


class Outcome(IntEnum):
    """What came of an observation.

    ACTED: an action of the policy's.
    LATE: the backend was late, and what the guards chose was handed out instead.
    RAISED: an error, and no action.
    CHUNK: `act_chunk` handed out a whole chunk, whose first action is recorded.
    """

    ACTED = 0
    LATE = 1
    RAISED = 2
    CHUNK = 3


class PolicyInfo(Struct, frozen=True):
    """The policy whose decisions were recorded.

    Attributes:
        bundle: name of its directory.
        manifest_sha256: digest of its manifest.
        precision: the least precise of its graphs'.
        backend: who ran them.
        seed: start of the random sequence, at load or at the latest reset before the recording.
        temperature: of the code distribution; 0 is greedy.
        replan_every: actions executed of every chunk.
        n_obs_steps: observations in a window.
        action_limits: what chunks were clamped to, lowest and highest (A,); None is nothing.
        fps: observations a second of the demonstrations; None where not known, and in older files.
    """

    bundle: Text
    manifest_sha256: Sha256
    precision: Precision
    backend: Text
    seed: int
    temperature: float
    replan_every: int
    n_obs_steps: Positive
    action_limits: tuple[Limit, Limit] | None
    fps: Annotated[float, Meta(gt=0)] | None = None


class RecordingInfo(Struct, frozen=True):
    """What a file says about its recording; `policy` comes with decisions only."""

    format_version: Literal[2]
    image_keys: Annotated[tuple[Text, ...], Meta(min_length=1)]
    state_key: Text
    policy: PolicyInfo | None = None


class Mark(Struct, frozen=True):
    """A moment that somebody will look for.

    Attributes:
        episode: in which it was.
        step: of the newest observation then, since the reset.
        time: ns since 1970, by the clock of rows.
        text: what `EdgePolicy.mark` was told, an error's words, or how late a step was.
    """

    episode: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    step: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    time: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    text: Text


def files(folder: Path) -> list[Path]:
    """A recording's files in their order; none where there is no recording."""
    return sorted(folder.glob(FILE_PATTERN), key=lambda path: (len(path.name), path.name))


def row_columns(state_key: str, state_dim: int, action_dim: int) -> Columns:
    """Key -> dtype and shape of one row with decisions, but for frames."""
    return {
        EPISODE: ("int64", ()),
        STEP: ("int64", ()),
        state_key: ("float32", (state_dim,)),
        TIME: ("int64", ()),
        OBSERVATION_TIME: ("int64", ()),
        ACTION: ("float32", (action_dim,)),
        SECONDS: ("float64", ()),
        OUTCOME: ("uint8", ()),
    }


def decision_columns(codes: int, chunk: tuple[int, int]) -> Columns:
    """Key -> dtype and shape of one decision, but for stages' seconds; `chunk` is (W, A)."""
    chunks = dict.fromkeys(("decoded_chunk", "offset_chunk", "action_chunk"), ("float32", chunk))
    columns: Columns = {
        EPISODE: ("int64", ()),
        STEP: ("int64", ()),
        "codes": ("int64", (2,)),
        "code_probabilities": ("float64", (2, codes)),
        "draws": ("float64", (2,)),
        "clamped": ("bool", chunk),
        **chunks,
    }
    return {DECISION + name: column for name, column in columns.items()}


def is_feature(key: str) -> bool:
    """Whether a key is one of an observation's, not one of the recording's own."""
    return key not in OWN and not key.startswith(DECISION)


def pack_decisions(decisions: Sequence[tuple[int, Decision]]) -> dict[str, Array]:
    """Decisions, each with its episode, as arrays of a file; nothing of none."""
    if not decisions:
        return {}
    made = [decision for _, decision in decisions]
    packed: dict[str, Array] = {
        DECISION_EPISODE: np.array([episode for episode, _ in decisions], np.int64),
        DECISION_STEP: np.array([decision.step for decision in made], np.int64),
    }
    for name in DECISION_ARRAYS:
        packed[DECISION + name] = np.stack([getattr(decision, name) for decision in made])
    for stage in sorted({stage for decision in made for stage in decision.seconds}):
        times = [decision.seconds.get(stage, np.nan) for decision in made]
        packed[STAGE_SECONDS + stage] = np.array(times, np.float64)
    return packed


def unpack_decision(arrays: Mapping[str, Array], row: int) -> Decision:
    """One decision of what `pack_decisions` made."""
    times = {
        key.removeprefix(STAGE_SECONDS): float(values[row])
        for key, values in arrays.items()
        if key.startswith(STAGE_SECONDS) and not np.isnan(values[row])
    }
    fields: dict[str, Any] = {name: arrays[DECISION + name][row] for name in DECISION_ARRAYS}
    return Decision(step=int(arrays[DECISION_STEP][row]), seconds=times, **fields)
