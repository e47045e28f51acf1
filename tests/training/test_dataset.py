"""The data set reader: both formats, both ways to store images, and what can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqbet_edge.errors import DatasetError, DiskError
from vqbet_edge.training.dataset import LeRobotDataset

PUSHT = Path(__file__).parents[1] / "data" / "pusht"
CAMERA, STATE = "observation.image", "observation.state"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
TABLE, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
INFO, START = "meta/info.json", f"videos/{CAMERA}/from_timestamp"
Change = Callable[[Path], object]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PUSHT, tmp_path / "pusht"))


def rewritten(change: Callable[[dict], object], name: str = TABLE) -> Change:
    """A change of a parquet file's columns, given as lists."""

    def rewrite(root: Path) -> None:
        table = pq.read_table(root / name)
        columns = table.to_pydict()
        change(columns)
        fields = [table.schema.field(key) for key in columns]
        pq.write_table(pa.table(columns, pa.schema(fields)), root / name)

    return rewrite


def without(rows: slice) -> Change:
    def drop(columns: dict) -> None:
        for values in columns.values():
            del values[rows]

    return rewritten(drop)


def edited_info(**changes: object) -> Change:
    return lambda root: (root / INFO).write_text(
        json.dumps(json.loads((root / INFO).read_text()) | changes)
    )


def truncated(name: str) -> Change:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[: 1 << 14])


def at_other_times(scale: float, offset: float) -> Change:
    return rewritten(
        lambda c: c.update(timestamp=[scale * seconds + offset for seconds in c["timestamp"]])
    )


def to_v21(target: Path) -> Path:
    """The first demonstration in the older format: a file per episode."""
    length = int(LeRobotDataset.open(PUSHT).bounds[1])
    for folder in ("meta", "data/chunk-000", f"videos/chunk-000/{CAMERA}"):
        (target / folder).mkdir(parents=True)
    rows = pq.read_table(PUSHT / TABLE).slice(0, length)
    pq.write_table(rows, target / "data/chunk-000/episode_000000.parquet")
    shutil.copy(PUSHT / VIDEO, target / f"videos/chunk-000/{CAMERA}/episode_000000.mp4")
    line = {"episode_index": 0, "tasks": ["push"], "length": length}
    (target / "meta/episodes.jsonl").write_text(json.dumps(line))
    shutil.copy(PUSHT / INFO, target / INFO)
    edited_info(codebase_version="v2.1", data_path=None, video_path=None)(target)
    return target


def test_reads_vectors_and_frames_of_format_v30() -> None:
    dataset = LeRobotDataset.open(PUSHT)
    table = pq.read_table(PUSHT / TABLE)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (4, 579, 10)
    for key in ("action", "observation.state"):
        np.testing.assert_array_equal(dataset.column(key), np.stack(table[key].to_numpy()))
    with av.open(str(PUSHT / VIDEO)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    np.testing.assert_array_equal(dataset.frames(CAMERA), frames)
    alone = LeRobotDataset.open(PUSHT).episode(2)
    rows = slice(dataset.bounds[2], dataset.bounds[3])
    np.testing.assert_array_equal(alone[CAMERA], frames[rows])
    np.testing.assert_array_equal(alone["action"], dataset.column("action")[rows])


def test_statistics_are_those_of_the_data_sets_writer() -> None:
    written = json.loads((PUSHT / "meta/stats.json").read_text())
    dataset = LeRobotDataset.open(PUSHT)
    basic = ("min", "max", "mean")
    for key, names in {"action": (*basic, "std"), STATE: (*basic, "std"), CAMERA: basic}.items():
        for name, values in dataset.statistics(key, names).items():
            np.testing.assert_allclose(values, written[key][name], rtol=1e-6)


def test_a_deviation_that_cannot_be_is_computed_from_the_frames() -> None:
    """LeRobot 0.4.4 converted this data set, and squares pixels as uint8."""
    written = json.loads((PUSHT / "meta/stats.json").read_text())[CAMERA]
    dataset = LeRobotDataset.open(PUSHT)
    got = dataset.statistics(CAMERA, ("mean", "std"))
    pixels = dataset.frames(CAMERA) / 255
    np.testing.assert_allclose(got["std"].ravel(), pixels.std((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(got["mean"].ravel(), pixels.mean((0, 1, 2)), rtol=1e-6)
    assert (np.ravel(written["std"]) < pixels.std((0, 1, 2)) / 50).all()


def test_format_v21_reads_the_same(tmp_path: Path) -> None:
    new, old = LeRobotDataset.open(PUSHT), LeRobotDataset.open(to_v21(tmp_path / "v21"))
    expected, got = new.episode(0), old.episode(0)
    assert expected.keys() == got.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(got[key], values)


def test_disk_cache_decodes_once_and_notices_a_changed_video(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = LeRobotDataset.open(copy).frames(CAMERA)
    np.testing.assert_array_equal(
        LeRobotDataset.open(copy, cache_dir=cache).frames(CAMERA), expected
    )
    (entry,) = cache.iterdir()
    written = entry.stat().st_mtime_ns
    again = LeRobotDataset.open(copy, cache_dir=cache).frames(CAMERA)
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(again, expected)
    assert entry.stat().st_mtime_ns == written
    (copy / VIDEO).touch()
    LeRobotDataset.open(copy, cache_dir=cache).frames(CAMERA)
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_is_named() -> None:
    with pytest.raises(DiskError, match="free space"):
        LeRobotDataset.open(PUSHT, cache_dir=Path("/dev/full/cache")).frames(CAMERA)


def test_split_is_by_episode_and_repeatable() -> None:
    dataset = LeRobotDataset.open(PUSHT)
    split = dataset.split(0.25, seed=3)
    assert sorted(split.train + split.validation) == [0, 1, 2, 3]
    assert len(split.validation) == 1
    assert split == dataset.split(0.25, seed=3)
    assert dataset.split(0.0).validation == ()


def test_a_cut_beginning_keeps_its_frames(copy: Path) -> None:
    """Rows keep their numbers and times, which still point into the video, as in lerobot#2775."""
    expected = LeRobotDataset.open(copy).episode(2)
    bounds = LeRobotDataset.open(copy).bounds
    start, lengths = int(bounds[2]), np.diff(bounds) - [0, 0, 3, 0]
    without(slice(start, start + 3))(copy)
    rewritten(lambda columns: columns.update(length=lengths.tolist()), EPISODES)(copy)
    found = LeRobotDataset.open(copy).episode(2)
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values[3:])


@pytest.mark.parametrize("value", [0, "many", float("nan")], ids=repr)
def test_a_size_of_chunks_that_is_none_is_named(tmp_path: Path, value: object) -> None:
    old = to_v21(tmp_path / "v21")
    edited_info(chunks_size=value)(old)
    with pytest.raises(DatasetError, match=r"info\.json: expected a number for 'chunks_size'"):
        LeRobotDataset.open(old)


DAMAGED: dict[str, tuple[Change, str]] = {
    "no video": (lambda root: (root / VIDEO).unlink(), "file-000.mp4 is missing; episode 0"),
    "half a video": (truncated(VIDEO), "file-000.mp4: episode 0 is corrupt"),
    # The robot's clock and the camera's run apart, as lerobot#3177 has it.
    "a slow clock": (
        at_other_times(1.05, 0),
        r"frame \d+ of episode 0 \(at .* s\) is not in the video: timestamps and video "
        r"disagree, the nearest frame is 0.0\d+ s away where frames are 0.100 s apart. Correct",
    ),
    "a late start": (
        at_other_times(1, 1.7e5),
        r"frame 0 of episode 0 .* it ends at 57.800 s. .*incomplete, .* timestamps belong to another video",
    ),
    "a start that is none": (
        rewritten(lambda c: c[START].__setitem__(1, None), EPISODES),
        f"expected a number for '{START}'",
    ),
    "half a table": (truncated(TABLE), "file-000.parquet .*episode 0.* corrupt"),
    "not a number": (
        rewritten(lambda c: c["action"][170].__setitem__(1, float("nan"))),
        "'action' of episode 1 is not finite at frame 9",
    ),
    "a frame too few": (without(slice(300, 301)), "episode 2 has 140 frames, meta/ says 141"),
    "no action": (rewritten(lambda c: c.pop("action")), "file-000.parquet .*action"),
    "no episodes": (
        rewritten(lambda c: [values.clear() for values in c.values()], EPISODES),
        "has no episodes",
    ),
    "an old format": (
        edited_info(codebase_version="v1.6"),
        "format v1.6; expected one of",
    ),
    "a way out": (edited_info(video_path="../../{video_key}.mp4"), "leaves the data set"),
    "no JSON": (lambda root: (root / INFO).write_text("{"), "info.json is not JSON"),
    "no info": (lambda root: (root / INFO).unlink(), "cannot read .*info.json"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_before_any_work(copy: Path, name: str) -> None:
    damage, message = DAMAGED[name]
    damage(copy)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset.open(copy)


def test_a_frame_of_another_shape_is_named(copy: Path) -> None:
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"][CAMERA]["shape"] = [120, 96, 3]
    (copy / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"episode 1 decodes to .*96, 96.* expected .*120, 96"):
        LeRobotDataset.open(copy).episode(1)


def test_what_is_no_data_set_is_named() -> None:
    with pytest.raises(DatasetError, match="neither a folder nor the id"):
        LeRobotDataset.open("no/such/folder")
    with pytest.raises(DatasetError, match="no vector 'reward'"):
        LeRobotDataset.open(PUSHT).column("reward")
    with pytest.raises(DatasetError, match="no camera 'wrist'"):
        LeRobotDataset.open(PUSHT).frames("wrist")


def test_image_columns_and_several_cameras_as_lerobot_writes_them(
    tmp_path: Path, lerobot: Callable[[str], ModuleType]
) -> None:
    reference = lerobot("datasets.lerobot_dataset")
    cameras = {
        f"observation.images.{name}": {
            "dtype": "image",
            "shape": (24, 32, 3),
            "names": ["height", "width", "channels"],
        }
        for name in ("front", "wrist")
    }
    vectors = {
        key: {"dtype": "float32", "shape": (2,), "names": None}
        for key in ("observation.state", "action")
    }
    written = reference.LeRobotDataset.create(
        "test/cameras", 10, cameras | vectors, root=tmp_path / "cameras", use_videos=False
    )
    rng = np.random.default_rng(0)
    episodes = []
    for length in (3, 5):
        frames = {key: rng.integers(0, 256, (length, 24, 32, 3), np.uint8) for key in cameras}
        frames |= {key: rng.normal(size=(length, 2)).astype(np.float32) for key in vectors}
        for t in range(length):
            written.add_frame({key: values[t] for key, values in frames.items()} | {"task": "t"})
        written.save_episode()
        episodes.append(frames)
    written.finalize()
    dataset = LeRobotDataset.open(tmp_path / "cameras")
    assert dataset.image_keys == tuple(cameras)
    for position, frames in enumerate(episodes):
        got = dataset.episode(position, list(frames))
        for key, values in frames.items():
            np.testing.assert_array_equal(got[key], values)


def test_chosen_episodes_are_lerobots(
    pusht: Path, tmp_path: Path, lerobot: Callable[[str], ModuleType]
) -> None:
    whole, some = LeRobotDataset.open(pusht), LeRobotDataset.open(pusht, episodes=["0:2", 3])
    assert [episode.index for episode in some.info.episodes] == [0, 1, 3]
    rows = np.r_[whole.bounds[0] : whole.bounds[2], whole.bounds[3] : whole.bounds[4]]
    np.testing.assert_array_equal(
        some.frames("observation.image"), whole.frames("observation.image")[rows]
    )
    assert some._decoder.digest("observation.image") != whole._decoder.digest("observation.image")
    copy = Path(shutil.copytree(pusht, tmp_path / "pusht"))
    info = json.loads((copy / "meta/info.json").read_text())
    del info["features"]["observation.image"]  # LeRobot needs a decoder that torchvision lacks
    (copy / "meta/info.json").write_text(json.dumps(info))
    reference = lerobot("datasets.lerobot_dataset").LeRobotDataset
    theirs = reference("test/pusht", root=copy, episodes=[0, 1, 3])
    for key in ("observation.state", "action"):
        expected = np.stack([np.asarray(row) for row in theirs.hf_dataset[key]])
        np.testing.assert_array_equal(some.column(key), expected)


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([4], "has no episode 4; they are numbered 0 to 3"),
        (["2:9"], "has no episode 8; they are"),
        (
            ["last"],
            "--episodes takes numbers, and ranges without their end such as 0:50, got 'last'",
        ),
        (["3:3"], "--episodes takes numbers"),
        ([], "--episodes names none"),
    ],
)
def test_episodes_that_are_not_there_are_named(
    pusht: Path, episodes: list[int | str], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset.open(pusht, episodes=episodes)
