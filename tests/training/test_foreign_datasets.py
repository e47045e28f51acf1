"""Data sets as other people have them: a healthy one with one property changed.

LeRobot's own reader says what is right: what it loads, we load, frame by frame the same.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.writer import write_dataset

DATA, OTHER = "data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
INFO, STATS = "meta/info.json", "meta/stats.json"
CAMERA, STATE, DEPTH = "observation.image", "observation.state", "observation.images.depth"
LENGTHS = (9, 12, 7)
SIZE = 32
Lerobot = Callable[[str], ModuleType]


def demonstrations() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            CAMERA: random.integers(0, 256, (length, SIZE, SIZE, 3), np.uint8),
            STATE: random.normal(size=(length, 3)).astype(np.float32),
            "action": random.normal(size=(length, 2)).astype(np.float32),
            "next.reward": random.normal(size=(length, 1)).astype(np.float32),
        }
        for length in LENGTHS
    ]


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "healthy", demonstrations(), 10.0, "x")
    return tmp_path / "healthy"


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_column(path: Path, key: str, values: object) -> None:
    """Replace or append a column."""
    table = pq.read_table(path)
    if key in table.column_names:
        table = table.drop_columns(key)
    new = values if isinstance(values, pa.Array) else pa.array(values)
    pq.write_table(table.append_column(key, new), path)


def split_file(root: Path, second: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Move the rows that `second` chooses by episode and frame into another file."""
    table = pq.read_table(root / DATA)
    chosen = second(np.asarray(table["episode_index"]), np.asarray(table["frame_index"]))
    pq.write_table(table.filter(pa.array(~chosen)), root / DATA)
    pq.write_table(table.filter(pa.array(chosen)), root / OTHER)


def add_feature(root: Path, key: str, values: object, **spec: object) -> None:
    edit_column(root / DATA, key, values)
    feature = {"dtype": "float32", "shape": [1], "names": None} | spec
    edit_json(root / INFO, lambda info: info["features"].update({key: feature}))


def add_depth_camera(root: Path) -> None:
    depth = pq.read_table(root / DATA)[CAMERA].combine_chunks()
    spec = {"dtype": "image", "shape": [SIZE, SIZE, 1], "names": ["height", "width", "channels"]}
    add_feature(root, DEPTH, depth, **spec, info={"video.is_depth_map": True})
    one = {name: [[[900.0]]] for name in ("min", "max", "mean", "std", "count")}
    edit_json(root / STATS, lambda stats: stats.update({DEPTH: one}))


def move_an_episode(root: Path) -> None:
    """Into another file than `meta/` says, which LeRobot's merges leave null."""
    split_file(root, lambda episode, _: episode == 2)
    edit_column(root / EPISODES, "data/file_index", pa.array([0, 0, None], pa.int64()))


NAN = np.full(sum(LENGTHS), np.nan, np.float32)
HARMLESS: dict[str, Callable[[Path], object]] = {
    "a stale file_index": move_an_episode,
    "an episode over two files": lambda root: split_file(
        root, lambda episode, frame: (episode == 2) | ((episode == 1) & (frame >= 5))
    ),
    "NaN in next.reward": lambda root: edit_column(root / DATA, "next.reward", NAN),
    "nulls in a bool column": lambda root: add_feature(
        root, "next.success", pa.array([None] * (sum(LENGTHS) - 1) + [True]), dtype="bool"
    ),
    "a column of words": lambda root: add_feature(
        root, "language", ["push"] * sum(LENGTHS), dtype="string"
    ),
    "a depth camera": add_depth_camera,
    "no statistics": lambda root: (root / STATS).unlink(),
    "no templates of paths": lambda root: edit_json(
        root / INFO, lambda info: [info.pop(key) for key in ("data_path", "video_path")]
    ),
    "vectors as other libraries write them": lambda root: edit_column(
        root / DATA,
        "action",
        pq.read_table(root / DATA)["action"].combine_chunks().cast(pa.large_list(pa.float32())),
    ),
    "wrong totals and what nobody knows yet, of a newer minor version": lambda root: edit_json(
        root / INFO,
        lambda info: info.update(
            total_frames=28,
            chunks_size=0,
            tools=None,
            depth={"unit": "mm"},
            codebase_version="v3.1",
        ),
    ),
    "shuffled episodes in meta": lambda root: pq.write_table(
        pq.read_table(root / EPISODES).take([2, 0, 1]), root / EPISODES
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_is_read_as_lerobot_reads_it(healthy: Path, name: str, lerobot: Lerobot) -> None:
    HARMLESS[name](healthy)
    ours = LeRobotDataset.open(healthy)
    assert ours.image_keys == (CAMERA,)
    assert np.diff(ours.bounds).tolist() == list(LENGTHS)
    try:
        theirs = lerobot("datasets.lerobot_dataset").LeRobotDataset("t/x", root=healthy)
        rows = [theirs[index] for index in range(len(theirs))]
    except (KeyError, TypeError, ValueError, OSError) as error:
        pytest.fail(f"LeRobot does not load it: {error!r}")
    # Rows lie in LeRobot's order of files.
    rows.sort(key=lambda row: (int(row["episode_index"]), int(row["frame_index"])))
    assert {row["task"] for row in rows} == {"x"}
    for key in (STATE, "action"):
        np.testing.assert_array_equal(ours.column(key), np.stack([row[key] for row in rows]))
    frames = np.stack([row[CAMERA].permute(1, 2, 0).numpy() for row in rows])
    np.testing.assert_array_equal(ours.frames(CAMERA), np.rint(frames * 255).astype(np.uint8))
    for position, demonstration in enumerate(demonstrations()):
        for key, values in LeRobotDataset.open(healthy).episode(position).items():
            np.testing.assert_array_equal(values, demonstration[key])


HOMES: dict[str, tuple[dict[str, str], str]] = {
    "HF_LEROBOT_HOME": ({"HF_LEROBOT_HOME": "~/lr"}, "lr"),
    "HF_HOME of a variable": ({"HF_HOME": "$DISK/hf", "DISK": "{home}"}, "hf/lerobot"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "{home}/xdg"}, "xdg/huggingface/lerobot"),
    "nothing": ({}, ".cache/huggingface/lerobot"),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "name",
    [n if n == "nothing" else pytest.param(n, marks=pytest.mark.extended) for n in HOMES],
)
def test_lerobots_folder_is_where_lerobot_has_it(healthy: Path, tmp_path: Path, name: str) -> None:
    """By its variables, which no shell may have expanded, with the Hub's client and without."""
    oracle.lerobot("utils.constants")
    variables, place = HOMES[name]
    shutil.copytree(healthy, tmp_path / "home" / place / "me" / "pusht")
    code = """
import sys
from lerobot.utils.constants import HF_LEROBOT_HOME
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.dataset import _lerobot_home
assert _lerobot_home() == HF_LEROBOT_HOME
sys.modules["huggingface_hub.constants"] = None
assert _lerobot_home() == HF_LEROBOT_HOME
print(LeRobotDataset.open("me/pusht").num_frames)
"""
    assert in_home(code, tmp_path, variables) == str(sum(LENGTHS))


@pytest.mark.parametrize("tag", ["v3.0", pytest.param("main", marks=pytest.mark.extended)])
def test_what_lerobot_has_downloaded_is_found(healthy: Path, tmp_path: Path, tag: str) -> None:
    """As LeRobot 0.6 downloads it."""
    folder = tmp_path / "home/lr/hub/datasets--me--pusht"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / tag).write_text(COMMIT)
    shutil.copytree(healthy, folder / "snapshots" / COMMIT)
    code = (
        "from vqbet_edge.training.dataset import LeRobotDataset; "
        "print(LeRobotDataset.open('me/pusht').num_frames)"
    )
    variables = {"HF_LEROBOT_HOME": "~/lr", "HF_HUB_OFFLINE": "1"}
    assert in_home(code, tmp_path, variables) == str(sum(LENGTHS))


def in_home(code: str, root: Path, variables: dict[str, str]) -> str:
    """What a program prints whose home is `root`/home."""
    home = root / "home"
    home.mkdir(exist_ok=True)
    mine = {"HF_HOME", "HF_LEROBOT_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"}
    env = {key: value for key, value in os.environ.items() if key not in mine}
    env |= {"HOME": str(home), **{k: v.format(home=home) for k, v in variables.items()}}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_asked_for_is_checked_then(healthy: Path) -> None:
    edit_column(healthy / DATA, "next.reward", NAN)
    dataset = LeRobotDataset.open(healthy)
    with pytest.raises(DatasetError, match=r"'next.reward' of episode 0 is not finite at frame 0"):
        dataset.column("next.reward")
    add_feature(healthy, "note", ["a"] * sum(LENGTHS), dtype="float32")
    with pytest.raises(DatasetError, match="'note' holds string, expected numbers"):
        LeRobotDataset.open(healthy).column("note")


def test_whole_numbers_and_shuffled_rows(healthy: Path) -> None:
    """Joints in encoder ticks; rows as a merge through a hash table leaves them."""
    random = np.random.default_rng(1)
    ticks = random.integers(0, 4096, (sum(LENGTHS), 2))
    add_feature(healthy, "action", list(ticks), dtype="int64", shape=[2])
    table = pq.read_table(healthy / DATA)
    pq.write_table(table.take(random.permutation(len(table))), healthy / DATA)
    dataset = LeRobotDataset.open(healthy)
    np.testing.assert_array_equal(dataset.column("action"), ticks)
    np.testing.assert_allclose(dataset.statistics("action")["mean"], ticks.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(dataset.frames(CAMERA)[9:21], demonstrations()[1][CAMERA])


def incomplete(root: Path) -> None:
    split_file(root, lambda episode, frame: (episode == 1) & (frame >= 5))
    (root / OTHER).unlink()


NO_IMAGE = {"bytes": None, "path": "images/0.png"}
IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "the second file of an episode is missing": (
        incomplete,
        "file-000.parquet: episode 1 has 5 frames, meta/ says 12",
    ),
    "a frame is there twice": (
        lambda root: pq.write_table(pq.read_table(root / DATA).slice(0, 1), root / OTHER),
        "episode 0 are not numbered one by one: frame 1 is missing, or 0 is there twice",
    ),
    "an episode is not in meta": (
        lambda root: pq.write_table(pq.read_table(root / EPISODES).slice(0, 2), root / EPISODES),
        "has frames of episode 2, which .*meta does not list",
    ),
    "two episodes of one number": (
        lambda root: edit_column(root / EPISODES, "episode_index", [0, 1, 1]),
        "meta lists episode 1 twice; number the episodes anew",
    ),
    "a clone without its large files": (
        lambda root: (root / DATA).write_text("version https://git-lfs.github.com/spec/v1\noid x"),
        "it is a Git LFS pointer, not the file; in .*chunk-000 type: git lfs pull",
    ),
    "an action of two axes": (
        lambda root: add_feature(
            root, "action", pa.array(np.zeros((sum(LENGTHS), 2, 3)).tolist()), shape=[2, 3]
        ),
        "no vector 'action', it is float32 of 2x3; write it with one axis",
    ),
    "no images in the file": (
        lambda root: edit_column(root / DATA, CAMERA, pa.array([NO_IMAGE] * sum(LENGTHS), IMAGES)),
        "episode 0 lacks images of 'observation.image'; they have to be embedded",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(healthy: Path, name: str) -> None:
    damage, message = DAMAGED[name]
    damage(healthy)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset.open(healthy).episode(0)


@pytest.mark.parametrize("value", [0, -1, float("nan"), 1e300, "ten", True, [10], None], ids=repr)
def test_numbers_that_are_none(healthy: Path, value: object) -> None:
    """A rate is named; a feature whose shape no array has is left out."""
    edit_json(healthy / INFO, lambda info: info["features"]["next.reward"].update(shape=[value]))
    assert "next.reward" not in LeRobotDataset.open(healthy).features
    edit_json(healthy / INFO, lambda info: info.update(fps=value))
    with pytest.raises(DatasetError, match=r"info\.json: expected a number for 'fps'"):
        LeRobotDataset.open(healthy)


@pytest.mark.parametrize("value", [-1, 3.5, None], ids=repr)
@pytest.mark.parametrize("name", ["episode_index", "length"])
def test_numbers_of_an_episode_that_are_none_are_named(
    healthy: Path, name: str, value: object
) -> None:
    values = pa.array([value, *([9, 12, 7] if name == "length" else [0, 1, 2])[1:]], pa.float64())
    edit_column(healthy / EPISODES, name, values)
    with pytest.raises(DatasetError, match=f"episodes: expected a number for '{name}'"):
        LeRobotDataset.open(healthy)


def test_cameras_are_chosen_by_name(healthy: Path) -> None:
    add_depth_camera(healthy)
    assert LeRobotDataset.open(healthy, cameras=()).image_keys == ()
    with pytest.raises(DatasetError, match=r"no camera 'wrist'; it has observation.image \(image"):
        LeRobotDataset.open(healthy, cameras=["wrist"])
    with pytest.raises(DatasetError, match=f"'{DEPTH}' is a depth map of 32x32x1"):
        LeRobotDataset.open(healthy, cameras=[DEPTH])


BROKEN_STATISTICS: dict[str, Callable[[dict], object]] = {
    "without std": lambda stats: stats[CAMERA].pop("std"),
    "of one channel": lambda stats: stats[CAMERA].update(std=[[[0.2]]]),
    "null": lambda stats: stats[CAMERA].update(std=None),
}
NAMES = ("min", "max", "mean", "std", "q01", "q10", "q90", "q99")


def lerobots_statistics(reference: ModuleType, frames: np.ndarray) -> dict[str, np.ndarray]:
    """What LeRobot's writer keeps of an episode's camera."""
    pixels = frames.transpose(0, 3, 1, 2).astype(np.float64)
    found = reference.get_feature_stats(pixels, axis=(0, 2, 3), keepdims=True)
    return {k: v if k == "count" else np.squeeze(v / 255, axis=0) for k, v in found.items()}


@pytest.mark.parametrize("name", BROKEN_STATISTICS)
def test_statistics_of_a_camera_are_computed_where_they_are_missing(
    healthy: Path, name: str, lerobot: Lerobot
) -> None:
    edit_json(healthy / STATS, BROKEN_STATISTICS[name])
    reference = lerobot("datasets.compute_stats")
    frames = np.concatenate([d[CAMERA] for d in demonstrations()])
    expected = lerobots_statistics(reference, frames)
    got = LeRobotDataset.open(healthy).statistics(CAMERA, NAMES)
    for statistic in NAMES:
        assert got[statistic].shape == (3, 1, 1)
        # LeRobot takes quantiles from a histogram of 5,000 bins.
        limit = 1 / 255 if statistic.startswith("q") else 1e-6
        np.testing.assert_allclose(got[statistic], expected[statistic], rtol=1e-6, atol=limit)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_statistics_of_episodes_are_aggregated_as_lerobot_does(
    healthy: Path, version: str, lerobot: Lerobot
) -> None:
    reference = lerobot("datasets.compute_stats")
    parts = [lerobots_statistics(reference, d[CAMERA]) for d in demonstrations()]
    # Not those of the frames, so that it shows which ones are taken.
    for part in parts:
        part["mean"] = part["mean"] + 0.25
    expected = reference.aggregate_stats([{CAMERA: part} for part in parts])[CAMERA]
    (healthy / STATS).unlink()
    if version == "v3.0":
        for name in parts[0]:
            values = pa.array([part[name].tolist() for part in parts])
            edit_column(healthy / EPISODES, f"stats/{CAMERA}/{name}", values)
    else:
        to_v21(healthy, [{k: v.tolist() for k, v in part.items()} for part in parts])
    dataset = LeRobotDataset.open(healthy)
    got = dataset.statistics(CAMERA, NAMES)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)
    for position, demonstration in enumerate(demonstrations()):
        for key, values in dataset.episode(position).items():
            np.testing.assert_array_equal(values, demonstration[key])


def to_v21(root: Path, stats: list[dict[str, Any]]) -> None:
    """Rewrite in the older format, images in the parquet files."""
    table = pq.read_table(root / DATA)
    (root / DATA).unlink()
    lines, start = [], 0
    for index, length in enumerate(LENGTHS):
        name = f"data/chunk-000/episode_{index:06d}.parquet"
        pq.write_table(table.slice(start, length), root / name)
        lines.append({"episode_index": index, "tasks": ["x"], "length": length})
        start += length
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    rows = [{"episode_index": i, "stats": {CAMERA: part}} for i, part in enumerate(stats)]
    (root / "meta/episodes_stats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit_json(root / INFO, lambda info: info.update(codebase_version="v2.1"))
    for path in (root / "meta/episodes").rglob("*.parquet"):
        path.unlink()


def test_vectors_have_the_quantiles_of_the_data(pusht: Path, lerobot: Lerobot) -> None:
    dataset = LeRobotDataset.open(pusht)
    values = dataset.column("action")
    reference = lerobot("datasets.compute_stats").get_feature_stats(values, axis=0, keepdims=False)
    got = dataset.statistics("action", NAMES)
    for name in ("min", "max", "mean", "std"):
        # LeRobot adds up in float32.
        np.testing.assert_allclose(got[name], reference[name], rtol=1e-4)
    for name in ("q01", "q10", "q90", "q99"):
        # LeRobot takes them from a histogram: they may be a value or two of the data apart.
        apart = np.abs((values < got[name]).mean(0) - (values < reference[name]).mean(0))
        assert (apart <= 2 / len(values)).all(), name


def test_a_path_that_the_file_systems_encoding_lacks_is_refused(
    healthy: Path, tmp_path: Path
) -> None:
    healthy.rename(tmp_path / "données")
    code = f"""
import os
from vqbet_edge.errors import UsageError
from vqbet_edge.training.dataset import LeRobotDataset
try:
    LeRobotDataset.open(os.fsdecode({os.fsencode(tmp_path / "données")!r}))
except UsageError as error:
    print(error)
"""
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "takes file names to be ascii here; type first: export PYTHONUTF8=1" in in_home(
        code, tmp_path, variables
    )
    assert in_home(code, tmp_path, {"LC_ALL": "C.UTF-8"}) == ""
