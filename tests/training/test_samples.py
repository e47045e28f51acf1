"""Pieces of observations: where they come from, how they are spread, and what is refused."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import int8
import numpy as np
import pytest
from workshop import Workshop

from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.extras import install_command
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.runtime.recording import Recorder
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.samples import Sampler, random_pieces
from vqbet_edge.training.windows import Shuffle

IMAGE, STATE = "observation.image", "observation.state"


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Bundle:
    return Bundle.open(workshop.bundle(int8.CASE).bundle)


@pytest.fixture(scope="module")
def manifest(bundle: Bundle) -> Manifest:
    return bundle.manifest


@pytest.fixture(scope="module")
def dataset() -> LeRobotDataset:
    return LeRobotDataset.open(int8.PUSHT)


def record(folder: Path, manifest: Manifest, episodes: Iterable[dict[str, np.ndarray]]) -> Path:
    recorder = Recorder(manifest, folder, 1 << 30)
    for episode in episodes:
        for frame, state in zip(episode[IMAGE], episode[STATE], strict=True):
            recorder.append({IMAGE: frame, STATE: state})
        recorder.begin_episode()
    recorder.close()
    return folder


@pytest.fixture(scope="module")
def recording(
    manifest: Manifest, dataset: LeRobotDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every episode of the data set, in more than one file."""
    folder = tmp_path_factory.mktemp("recording") / "seen"
    record(folder, manifest, map(dataset.episode, range(dataset.num_episodes)))
    assert len(list(folder.iterdir())) > 1
    return folder


@pytest.mark.parametrize("steps", [1, 16, 100, 100_000])
def test_data_set_and_recording_give_the_same(
    manifest: Manifest, recording: Path, dataset: LeRobotDataset, steps: int
) -> None:
    samplers = [Sampler.open(source, manifest) for source in (int8.PUSHT, recording)]
    first, second = (sampler.places(steps) for sampler in samplers)
    assert first == second
    for place, *pieces in zip(first, *(s.pieces(steps) for s in samplers), strict=True):
        wanted = dataset.episode(place.episode)
        rows = slice(place.start, place.stop)
        for piece in pieces:
            np.testing.assert_array_equal(piece.frames[:, 0], wanted[IMAGE][rows])
            np.testing.assert_array_equal(piece.states, wanted[STATE][rows])
            assert (piece.frames.dtype, piece.states.dtype) == (np.uint8, np.float32)


def test_places_are_spread_and_never_overlap(manifest: Manifest, dataset: LeRobotDataset) -> None:
    sampler = Sampler.open(int8.PUSHT, manifest)
    for steps in (16, 64, 160, 100_000):
        places = sampler.places(steps)
        seen = [(p.episode, step) for p in places for step in range(p.start, p.stop)]
        assert len(seen) == len(set(seen)) == min(steps, len(places) * 16)
        for place in places:
            assert 0 <= place.start < place.stop <= len(dataset.episode(place.episode)[STATE])
    # All of it, but for what is shorter than a piece.
    assert len(seen) > dataset.num_frames - 16 * dataset.num_episodes
    assert {place.episode for place in sampler.places(64)} == {0, 1, 2, 3}


def test_pieces_are_read_when_they_are_asked_for(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[slice] = []
    original = LeRobotDataset.episode

    def counting(self: Any, position: int, keys: Any, steps: slice) -> Any:
        read.append(steps)
        return original(self, position, keys, steps)

    monkeypatch.setattr(LeRobotDataset, "episode", counting)
    pieces = Sampler.open(int8.PUSHT, manifest).pieces(160)
    assert not read
    assert len(next(pieces).states) == 16
    (steps,) = read
    assert steps.stop - steps.start == 16


def test_few_episodes_are_quartered_and_short_ones_are_short_pieces(
    manifest: Manifest, dataset: LeRobotDataset, tmp_path: Path
) -> None:
    episode = dataset.episode(0)
    places = Sampler.open(record(tmp_path / "one", manifest, [episode]), manifest).places(128)
    assert [place.block for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(place.episode == 0 for place in places)
    short = {key: values[:3] for key, values in episode.items()}
    pieces = Sampler.open(record(tmp_path / "short", manifest, [short] * 5), manifest).pieces(1000)
    assert [len(piece.states) for piece in pieces] == [3] * 5


@pytest.mark.parametrize("key", [IMAGE, STATE])
def test_one_message_for_what_a_source_lacks(manifest: Manifest, recording: Path, key: str) -> None:
    features = {
        (k.replace("observation", "seen") if k == key else k): f
        for k, f in manifest.input_features.items()
    }
    from msgspec.structs import replace

    other = replace(manifest, input_features=features)
    for source in (int8.PUSHT, recording):
        with pytest.raises(DatasetError, match=r"lack \['seen\..*they have .*trained on, or a rec"):
            Sampler.open(source, other)


def test_neither_a_recording_nor_a_data_set(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="neither a folder nor the id"):
        Sampler.open(str(tmp_path / "nothing"), manifest)
    with pytest.raises(DatasetError, match=r"info\.json"):
        Sampler.open(tmp_path, manifest)


def test_recordings_need_neither_torch_nor_pyarrow(recording: Path, workshop: Workshop) -> None:
    bundle = workshop.bundle(int8.CASE).bundle
    script = f"""
import sys
for name in ("torch", "pyarrow", "av"):
    sys.modules[name] = None
from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.training.dataset.samples import Sampler
manifest = Bundle.open({str(bundle)!r}).manifest
print(len(list(Sampler.open({str(recording)!r}, manifest).pieces(64))))
try:
    Sampler.open({str(int8.PUSHT)!r}, manifest)
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "4", done.stderr
    assert install_command("data") in done.stdout


def test_random_pieces_fill_the_normalised_range(bundle: Bundle) -> None:
    scaling = Affine.from_arrays(bundle.arrays, "state", bundle.manifest.state_dim)
    pieces = list(random_pieces(bundle.manifest, scaling, 500))
    assert [len(piece.states) for piece in pieces] == [16] * 31 + [4]
    states = np.concatenate([piece.states for piece in pieces])
    normalized = scaling.apply(states, np.empty_like(states))
    assert -1.001 < normalized.min() < -0.95
    assert 0.95 < normalized.max() < 1.001
    assert pieces[0].frames.shape == (16, 1, *bundle.manifest.frame_shape)


def test_a_shuffle_has_every_frame_once_an_epoch_in_a_new_order() -> None:
    shuffle = Shuffle(np.arange(100, 160), 8, seed=3)
    drawn = np.concatenate([shuffle.batch(step) for step in range(15)])  # of two epochs
    epochs = drawn[:60], drawn[60:]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100, 160))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(Shuffle(shuffle.frames, 8, seed=4).batch(0), shuffle.batch(0))
