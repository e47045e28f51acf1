"""Where frames come from: memory, a cache on disk, or processes that decode on the way."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sizes import short_run

from vqbet_edge.errors import DatasetError, DiskError, UsageError, VQBeTEdgeError
from vqbet_edge.training import feeding
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset import frames as decoding
from vqbet_edge.training.dataset.dataset import Block
from vqbet_edge.training.feeding import Feeder, Feeding, available_memory

CAMERA = "observation.image"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
CPU = torch.device("cpu")
# One at the beginning of an episode, one at its end, and batches that no process divides evenly.
WINDOWS = [
    np.array([[0, 0, 0, 1], [158, 159, 160, 160], [300, 301, 302, 303]]),
    np.array([[161 + i, 162 + i, 163 + i, 164 + i] for i in range(0, 70, 7)]),
    np.array([[578, 578, 578, 578]]),
]


@pytest.fixture
def copy(pusht: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pusht, tmp_path / "pusht"))


def seen(data: LeRobotDataset, way: Feeding) -> list[np.ndarray]:
    return [images.numpy() for images in Feeder(data, [CAMERA], way, CPU).images(WINDOWS)]


@pytest.mark.parametrize("size", [None, (40, 64)])
def test_all_ways_feed_the_same(pusht: Path, tmp_path: Path, size: tuple[int, int] | None) -> None:
    open_ = LeRobotDataset.open
    memory = seen(open_(pusht, resize_shape=size), Feeding("memory"))
    if size is None:
        with av.open(str(pusht / VIDEO)) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        for images, windows in zip(memory, WINDOWS, strict=True):
            np.testing.assert_array_equal(images[:, :, 0], frames[windows])
    for way, cache in [
        (Feeding("stream", 2), None),
        (Feeding("stream", 0), None),
        (Feeding("cache", 0), tmp_path),
        (Feeding("cache", 0), tmp_path),  # mapped
    ]:
        got = seen(open_(pusht, resize_shape=size, cache_dir=cache), way)
        assert len(got) == len(memory)
        for images, expected in zip(got, memory, strict=True):
            np.testing.assert_array_equal(images, expected)


def test_processes_decode_what_is_kept(pusht: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = LeRobotDataset.open(pusht).frames(CAMERA)
    monkeypatch.setattr(feeding, "_FEW_BLOCKS", 1)
    ours = os.getpid()
    decode = LeRobotDataset.decode

    def elsewhere(self: LeRobotDataset, block: Block) -> Any:
        assert os.getpid() != ours
        return decode(self, block)

    monkeypatch.setattr(LeRobotDataset, "decode", elsewhere)
    got = seen(LeRobotDataset.open(pusht), Feeding("memory", 2))
    for images, windows in zip(got, WINDOWS, strict=True):
        np.testing.assert_array_equal(images[:, :, 0], expected[windows])


def test_an_interrupted_cache_is_gone_on_with(pusht: Path, tmp_path: Path) -> None:
    expected = LeRobotDataset.open(pusht).frames(CAMERA)
    whole: list[int] = []

    def counting(data: LeRobotDataset, most: int) -> Any:
        def decode(blocks: Sequence[Block]) -> Iterator[np.ndarray]:
            for number, block in enumerate(blocks):
                if number == most:
                    raise KeyboardInterrupt
                whole.append(block.length)
                yield data.decode(block)

        return decode

    data = LeRobotDataset.open(pusht, cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        data.frames(CAMERA, counting(data, 7))
    (left,) = tmp_path.iterdir()
    with left.open("ab") as file:  # a frame that a kill left half
        file.write(b"1234")
    np.testing.assert_array_equal(data.frames(CAMERA, counting(data, 100)), expected)
    assert sum(whole) == len(expected)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_a_signal_stops_the_decoding_of_all(pusht: Path) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    feeder = Feeder(LeRobotDataset.open(pusht), [CAMERA], Feeding(), CPU, check)
    with pytest.raises(KeyboardInterrupt):
        next(feeder.images(WINDOWS))
    assert len(calls) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_that_is_cut_later_is_named(copy: Path, workers: int) -> None:
    data = LeRobotDataset.open(copy)
    (copy / VIDEO).write_bytes((copy / VIDEO).read_bytes()[:100_000])
    with pytest.raises(DatasetError, match=r"^\S*file-000\.mp4: episode \d is corrupt"):
        seen(data, Feeding("stream", workers))
    (copy / VIDEO).unlink()
    with pytest.raises(DatasetError, match=r"file-000\.mp4 is missing; episode 0 needs it"):
        seen(data, Feeding("stream", workers))


def test_a_process_that_is_killed_is_a_sentence(
    pusht: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeRobotDataset, "decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(VQBeTEdgeError, match=r"DataLoader worker .*lower --num-workers.* --resume"):
        seen(LeRobotDataset.open(pusht), Feeding("stream", 1))


def test_want_of_shared_memory_is_a_sentence(pusht: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's queues would drop what they cannot send, and the trainer wait for it for ever."""

    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(VQBeTEdgeError, match=r"unable to allocate shared memory.* --shm-size"):
        seen(LeRobotDataset.open(pusht), Feeding("stream", 1))


def test_a_program_ends_with_the_processes_that_decode(pusht: Path) -> None:
    code = f"""
import numpy as np, torch
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.feeding import Feeder, Feeding
data = LeRobotDataset.open({str(pusht)!r})
feeder = Feeder(data, ["{CAMERA}"], Feeding("stream", 2), torch.device("cpu"))
images = feeder.images([np.arange(6).reshape(3, 2)] * 9)
print(len(next(images)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


FREE = 10_000_000  # the frames are 16 MB


@pytest.mark.parametrize(
    ("free", "changes", "way"),
    [
        (4 * FREE, {}, "memory"),
        (2 * FREE, {}, "stream"),
        (2 * FREE, {"stream_frames": False}, "memory"),
        (4 * FREE, {"stream_frames": True}, "stream"),
        (FREE, {"frame_cache": "cache"}, "cache"),
        (FREE, {"resize_shape": (48, 48)}, "memory"),
    ],
)
def test_what_fits_is_chosen(
    pusht: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    changes: dict[str, Any],
    way: str,
) -> None:
    monkeypatch.setattr(feeding, "available_memory", lambda: free)
    if "frame_cache" in changes:
        changes = {"frame_cache": tmp_path / changes["frame_cache"]}
    config = short_run(pusht, tmp_path / "run", num_workers=3, **changes)
    size = config.resize_shape
    data = LeRobotDataset.open(pusht, resize_shape=size, cache_dir=config.frame_cache)
    chosen = Feeding.choose(config, data, [CAMERA], 1)
    assert chosen == Feeding(way, 3)  # type: ignore[arg-type]
    text = chosen.text(data, [CAMERA])
    assert text.startswith("4 MB of frames" if size else "16 MB of frames")
    assert "by 3 processes" in text
    # Every process of training keeps its own.
    if way == "memory" and not changes:
        assert Feeding.choose(config, data, [CAMERA], 2).way == "stream"


def test_what_does_not_fit_is_refused(
    pusht: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "available_memory", lambda: FREE)
    data = LeRobotDataset.open(pusht, cache_dir=tmp_path / "deep" / "cache")
    run = tmp_path / "run"
    with pytest.raises(UsageError, match=r"keeps 16 MB of frames in memory, and 10 MB are free"):
        Feeding.choose(short_run(pusht, run, stream_frames=False), data, [CAMERA], 1)
    cached = {"frame_cache": tmp_path / "deep" / "cache"}
    with pytest.raises(UsageError, match=r"--stream-frames True .* --frame-cache"):
        Feeding.choose(short_run(pusht, run, stream_frames=True, **cached), data, [CAMERA], 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=FREE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"need 16 MB in .*, and 10 MB are free there"):
        Feeding.choose(short_run(pusht, run, **cached), data, [CAMERA], 1)


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = available_memory()
    for name, text in {
        "memory.max": "30000000\n",
        "memory.current": "20000000\n",
        "memory.stat": "anon 15000000\ninactive_file 5000000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(feeding, "_GROUPS", tmp_path)
    assert available_memory() == 15_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > whole / 2


def test_of_many_videos_some_are_looked_into(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are when they are read: opening each takes milliseconds."""
    episodes = copy / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(episodes)
    place = table.schema.get_field_index(f"videos/{CAMERA}/file_index")
    pq.write_table(table.set_column(place, table.field(place), [[0, 0, 0, 1]]), episodes)
    broken = copy / VIDEO.replace("file-000", "file-001")
    broken.write_bytes((copy / VIDEO).read_bytes()[:100_000])
    with pytest.raises(DatasetError, match=r"file-001\.mp4: episode 3 is corrupt"):
        LeRobotDataset.open(copy)
    monkeypatch.setattr(decoding, "_LOOKED_INTO", 1)
    data = LeRobotDataset.open(copy)
    assert len(data.episode(2)[CAMERA]) == 141
    with pytest.raises(DatasetError, match=r"file-001\.mp4: episode 3 is corrupt"):
        data.episode(3)
    broken.unlink()
    with pytest.raises(DatasetError, match=r"file-001\.mp4 is missing"):
        LeRobotDataset.open(copy)


def test_only_chosen_cameras_come_from_the_hub(pusht: Path, tmp_path: Path) -> None:
    paths = [path for path in pusht.rglob("*") if path.is_file()]
    files = {str(path.relative_to(pusht)): path.read_bytes() for path in paths}
    files["videos/observation.wrist/chunk-000/file-000.mp4"] = b"large"
    code = f"""
from vqbet_edge.training.dataset import LeRobotDataset
data = LeRobotDataset.open("me/pusht", cameras=["{CAMERA}"])
print(data.num_frames, len(data.episode(0)["{CAMERA}"]))
later = LeRobotDataset.open("me/other", cameras=())
print(len(later.episode(0, ["{CAMERA}"])["{CAMERA}"]))
"""
    with hub.serving() as served:
        served.add("me/pusht", files)
        served.add("me/other", files)
        home = {"HF_LEROBOT_HOME": str(tmp_path / "lerobot")}
        env = {**os.environ, **served.variables(tmp_path / "home"), **home}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["579", "161", "161"], done.stderr
    assert not any("observation.wrist" in request for request in served.requests)
