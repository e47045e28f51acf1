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
    dataset = LeRobotDataset.open(PUSHT)
    for place, piece in zip(places, (p for part in parts for p in part), strict=True):
        wanted = dataset.episode(place.episode)
        rows = slice(place.start, place.start + 16)
        np.testing.assert_array_equal(piece.frames[:, 0], wanted[IMAGE][rows])
        np.testing.assert_array_equal(piece.states, wanted[STATE][rows])


def test_every_part_has_episodes_of_its_own(floating: Bundle) -> None:
    samples = samples_for(floating, PUSHT, 160)
    parts = [samples.calibration, samples.held_out, samples.verification]
    episodes = [{place.episode for place in part.places} for part in parts]
    assert sum(map(len, episodes)) == len(set.union(*episodes)) == 4


def test_the_digest_names_the_samples(floating: Bundle) -> None:
    digests = [samples_for(floating, PUSHT, steps).digest for steps in (64, 64, 80)]
    assert digests[0] == digests[1] != digests[2]


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


def test_too_few_samples(floating: Bundle, tmp_path: Path, episode: dict[str, Any]) -> None:
    folder = record(tmp_path / "seen", episode[IMAGE][:40], episode[STATE][:40])
    with pytest.raises(DatasetError, match=r"at least 64, .*record more with policy\.record"):
        samples_for(floating, folder)


def test_constant_frames(floating: Bundle, tmp_path: Path, episode: dict[str, Any]) -> None:
    frozen = np.repeat(episode[IMAGE][:1], len(episode[IMAGE]), axis=0)
    folder = record(tmp_path / "seen", frozen, episode[STATE])
    with pytest.raises(DatasetError, match=f"'{IMAGE}' are the same.*covered or disconnected"):
        samples_for(floating, folder)


def test_nan(floating: Bundle, tmp_path: Path, episode: dict[str, Any]) -> None:
    states = episode[STATE].copy()
    states[5:, 1] = np.nan
    folder = record(tmp_path / "seen", episode[IMAGE], states)
    with pytest.raises(DatasetError, match="episode 0, step 5 is not finite"):
        samples_for(floating, folder)


@pytest.mark.parametrize("key", [IMAGE, STATE])
def test_wrong_shapes(floating: Bundle, tmp_path: Path, episode: dict[str, Any], key: str) -> None:
    wrong = dict(episode)
    wrong[key] = wrong[key][:, :64] if key == IMAGE else wrong[key][:, :1]
    folder = record(tmp_path / "seen", wrong[IMAGE], wrong[STATE])
    with pytest.raises(DatasetError, match=f"observes '{key}' of shape .*own robot"):
        samples_for(floating, folder)


def test_another_robots_state(floating: Bundle, tmp_path: Path, episode: dict[str, Any]) -> None:
    """The right shape, but radians where the policy was trained on pixels."""
    foreign = episode[STATE] * 30 + 9000
    folder = record(tmp_path / "seen", episode[IMAGE], foreign)
    with pytest.raises(DatasetError, match="looks like another robot's: element"):
        samples_for(floating, folder)


def test_missing_features(floating: Bundle, tmp_path: Path, episode: dict[str, Any]) -> None:
    folder = record(tmp_path / "seen", episode[IMAGE], episode[STATE])
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"observation.state", b"observation.stale"))
    with pytest.raises(DatasetError, match=r"lack \['observation.state'\]"):
        samples_for(floating, folder)


def test_a_damaged_recording(floating: Bundle, tmp_path: Path, episode: dict[str, Any]) -> None:
    folder = record(tmp_path / "seen", episode[IMAGE], episode[STATE])
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"cannot be read.*record again"):
        samples_for(floating, folder)
