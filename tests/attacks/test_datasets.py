"""Data sets whose files name what is not theirs, or say what no data set has."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqbet_edge.errors import DatasetError, DiskError
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.frames import IMAGE_ERRORS, decode_image, kept_frames

PUSHT = Path(__file__).parents[1] / "data" / "pusht"
IMAGE = "observation.image"
VIDEO = f"videos/{IMAGE}/chunk-000/file-000.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
INFO = "meta/info.json"
LIST = "ffconcat version 1.0\nfile 'secret.mp4'\n"


def info(**changed: object) -> Callable[[Path], object]:
    """Other values in info.json; of Python's spellings, NaN and Infinity are JSON to most."""

    def change(root: Path) -> None:
        found = json.loads((root / INFO).read_text())
        (root / INFO).write_text(json.dumps(found | changed))

    return change


def camera(**changed: object) -> Callable[[Path], object]:
    features = json.loads((PUSHT / INFO).read_text())["features"]
    return info(features=features | {IMAGE: features[IMAGE] | changed})


def listed(root: Path) -> None:
    """A list of files where the video should be; the file that it names is a healthy one."""
    shutil.copy(root / VIDEO, (root / VIDEO).with_name("secret.mp4"))
    (root / VIDEO).write_text(LIST)


def starting(seconds: float) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        table = pq.read_table(root / EPISODES)
        key = f"videos/{IMAGE}/from_timestamp"
        place = table.schema.get_field_index(key)
        values = pa.array(np.full(len(table), seconds))
        pq.write_table(table.set_column(place, key, values), root / EPISODES)

    return change


def huge_integer(root: Path) -> None:
    (root / INFO).write_text('{"codebase_version": ' + "9" * 5000 + "}")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "an attribute in the template": (
        info(video_path="{video_key.__class__}.mp4"),
        "has the video_path",
    ),
    "any amount of memory": (
        info(video_path="{video_key:>999999999999}.mp4"),
        "has the video_path",
    ),
    "a way out": (info(video_path="{video_key}/../../../{video_key}.mp4"), "leaves the data set"),
    "infinitely many frames a second": (info(fps=float("inf")), "expected a number for 'fps'"),
    "a chunk without end": (
        info(codebase_version="v2.1", chunks_size=float("inf")),
        "expected a number for 'chunks_size'",
    ),
    "an integer of too many digits": (huge_integer, "info.json is not JSON"),
    "frames larger than any memory": (camera(shape=[1 << 40, 1 << 40, 3]), "has no camera"),
    "a beginning that is no number": (
        starting(float("nan")),
        "expected a number for .*from_timestamp",
    ),
    "a list of files instead of a video": (listed, "episode 0 is corrupt"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_data_set_has(tmp_path: Path, kind: str) -> None:
    """Refused with our error, before anything large is allocated; no list is followed."""
    root = Path(shutil.copytree(PUSHT, tmp_path / "pusht"))
    change, message = HOSTILE[kind]
    change(root)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset.open(root, cameras=[IMAGE]).frames(IMAGE)


@pytest.mark.parametrize("text", [LIST, "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"])
def test_an_image_is_no_list_of_files(cwd: Path, text: str) -> None:
    """Such a list would be of files in the current directory, and of addresses."""
    shutil.copy(PUSHT / VIDEO, cwd / "secret.mp4")
    with pytest.raises(IMAGE_ERRORS) as refused:
        decode_image(text.encode())
    assert not isinstance(refused.value, FileNotFoundError)


@pytest.mark.parametrize("value", [10**400, float("nan"), "1"])
def test_statistics_are_finite_whatever_stands_there(tmp_path: Path, value: object) -> None:
    root = Path(shutil.copytree(PUSHT, tmp_path / "pusht"))
    healthy = {"min": 0.0, "max": 1.0, "mean": 0.5, "std": 0.1}
    stats = {name: [[[value if name == "max" else each]]] * 3 for name, each in healthy.items()}
    (root / "meta/stats.json").write_text(json.dumps({IMAGE: stats}))
    found = LeRobotDataset.open(root).statistics(IMAGE)
    assert {"min", "max", "mean", "std"} <= found.keys()
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize(
    "header",
    ["{'descr':'|O','fortran_order':False,'shape':(1,)}",
     "{'descr':'|u1','fortran_order':False,'shape':(-5,)}",
     f"{{'descr':'|u1','fortran_order':False,'shape':({10**30},)}}",
     "(" * 3000],
)  # fmt: skip
def test_a_cache_of_frames_with_another_header(tmp_path: Path, header: str) -> None:
    text = header.encode() + b"\n"
    path = tmp_path / "cache.npy"
    path.write_bytes(b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(100))
    with pytest.raises(DiskError, match="is not the cache that was written"):
        kept_frames(lambda _: [], (1, 2, 2, 3), path)
