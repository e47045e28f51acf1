"""Where samples come from, how they are spread, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from int8 import PUSHT, samples_for
from safetensors.numpy import save_file

from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.training.dataset import LeRobotDataset

IMAGE, STATE = "observation.image", "observation.state"


def record(folder: Path, frames: Any, states: Any) -> Path:
    """A recording of one episode as of format 1, unchecked."""
    folder.mkdir()
    rows = {"episode": np.zeros(len(states), np.int64), IMAGE: frames, STATE: states}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in rows.items()},
        folder / "observations_000000.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def episode() -> dict[str, Any]:
    return LeRobotDataset.open(PUSHT).episode(0)


def test_samples_are_spread(floating: Bundle) -> None:
    samples = samples_for(floating, PUSHT, 160)
    assert samples.observations == 160
    parts = (samples.calibration, samples.held_out, samples.verification)
    places = [place for part in parts for place in part.places]
    assert {place.episode for place in places} == {0, 1, 2, 3}
    starts = sorted(place.start for place in places if place.episode == 0)
    assert len(starts) >= 2
    assert starts[-1] - starts[0] > 16
    episodes = [{place.episode for place in part.places} for part in parts]
    assert sum(map(len, episodes)) == len(set.union(*episodes))  # each has its own
    assert samples.digest == samples_for(floating, PUSHT, 160).digest
    assert samples.digest != samples_for(floating, PUSHT, 80).digest
    dataset = LeRobotDataset.open(PUSHT)
    for place, piece in zip(places, (p for part in parts for p in part), strict=True):
        wanted = dataset.episode(place.episode)
        rows = slice(place.start, place.start + 16)
        np.testing.assert_array_equal(piece.frames[:, 0], wanted[IMAGE][rows])
        np.testing.assert_array_equal(piece.states, wanted[STATE][rows])


def test_a_recording_does_as_well(
    floating: Bundle, tmp_path: Path, episode: dict[str, Any]
) -> None:
    """Of one long episode, the last quarter is for verifying."""
    folder = record(tmp_path / "seen", episode[IMAGE], episode[STATE])
    samples = samples_for(floating, folder)
    assert samples.observations == 64
    seen = (*samples.calibration.places, *samples.held_out.places)
    last_seen = max(place.start for place in seen) + 16
    for place, piece in zip(samples.verification.places, samples.verification, strict=True):
        assert place.start >= last_seen
        np.testing.assert_array_equal(piece.states, episode[STATE][place.start : place.start + 16])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f, s: (f[:40], s[:40]), r"at least 64, .*record more with policy\.record"),
        (lambda f, s: (np.repeat(f[:1], len(f), axis=0), s), "are the same.*covered or disconn"),
        (lambda f, s: (f, np.where(np.arange(len(s))[:, None] < 5, s, np.nan)), "step 5 is not fin"),
        (lambda f, s: (f[:, :64], s), rf"observes '{IMAGE}' of shape .*own robot"),
        (lambda f, s: (f, s[:, :1]), rf"observes '{STATE}' of shape .*own robot"),
        # The right shape, but radians where the policy was trained on pixels.
        (lambda f, s: (f, s * 30 + 9000), "looks like another robot's: element"),
    ],
    ids=["few", "constant", "NaN", "frames' shape", "states' shape", "another robot's"],
)  # fmt: skip
def test_what_does_not_do_is_refused(
    floating: Bundle, tmp_path: Path, episode: dict[str, Any], change: Any, reason: str
) -> None:
    folder = record(tmp_path / "seen", *change(episode[IMAGE], episode[STATE]))
    with pytest.raises(DatasetError, match=reason):
        samples_for(floating, folder)


def test_a_damaged_recording(floating: Bundle, tmp_path: Path, episode: dict[str, Any]) -> None:
    folder = record(tmp_path / "seen", episode[IMAGE], episode[STATE])
    (path,) = folder.iterdir()
    data = path.read_bytes()
    for damaged, reason in (
        (data.replace(b"observation.state", b"observation.stale"), r"lack \['observation.state'\]"),
        (data[:-9], r"cannot be read.*record again"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=reason):
            samples_for(floating, folder)
