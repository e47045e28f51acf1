"""Writing a small LeRobot data set, format v3.0, with images as PNG columns."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vqbet_edge.training.dataset.frames import Levels
from vqbet_edge.training.dataset.metadata import BASIC

Array = npt.NDArray[Any]
# By key: float32 or bool (T, dim), or uint8 (T, height, width, 3).
Demonstration = Mapping[str, Array]

_FILE = "chunk-000/file-000.parquet"


def write_dataset(
    root: Path, demonstrations: Iterable[Demonstration], fps: float, task: str
) -> None:
    """Write demonstrations, all with the same keys and shapes, into a new folder.

    One is taken, and held in memory, at a time; there is one at least. `LeRobotDataset.open` and
    LeRobot read the folder; `task` says in words what is demonstrated.
    """
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / folder).mkdir(parents=True)
    lengths: list[int] = []
    vectors: dict[str, list[Array]] = defaultdict(list)
    pixels: dict[str, Levels] = defaultdict(Levels)
    features: dict[str, Any] = {}
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for demonstration in demonstrations:
            rows = _with_places(demonstration, sum(lengths), len(lengths), fps)
            table = pa.table({key: _column(values) for key, values in rows.items()})
            if writer is None:
                features = {key: _feature(values) for key, values in rows.items()}
                writer = stack.enter_context(pq.ParquetWriter(root / "data" / _FILE, table.schema))
            writer.write_table(table)
            lengths.append(len(demonstration["action"]))
            for key, values in rows.items():
                if values.dtype == np.uint8:
                    # 200 or a few more of an episode, as LeRobot's writer does it.
                    pixels[key].add(values[:: max(1, len(values) // 200)])
                else:
                    vectors[key].append(values)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    episodes = {
        "episode_index": np.arange(len(lengths)),
        "tasks": [[task]] * len(lengths),
        "length": lengths,
        "dataset_from_index": bounds[:-1],
        "dataset_to_index": bounds[1:],
        **{
            f"{folder}/{part}_index": np.zeros(len(lengths), np.int64)
            for folder in ("data", "meta/episodes")
            for part in ("chunk", "file")
        },
    }
    pq.write_table(pa.table(episodes), root / "meta/episodes" / _FILE)
    # LeRobot reads this table with pandas and expects the words in its index.
    name = "__index_level_0__"
    column = {"name": None, "field_name": name, "pandas_type": "unicode", "numpy_type": "object"}
    index = {"index_columns": [name], "columns": [column | {"metadata": None}]}
    index |= {"column_indexes": []}
    tasks = pa.table({"task_index": [0], name: [task]}, metadata={"pandas": json.dumps(index)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    _write_json(root / "meta/info.json", _info(features, lengths, fps))
    stats = {key: _stats(np.concatenate(parts)) for key, parts in vectors.items()}
    _write_json(
        root / "meta/stats.json", stats | {key: _image_stats(p) for key, p in pixels.items()}
    )


def _with_places(
    demonstration: Demonstration, first: int, episode: int, fps: float
) -> dict[str, Array]:
    """A demonstration's columns and those that say where each row is."""
    frame = np.arange(len(demonstration["action"]))[:, None]
    return {
        **demonstration,
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full_like(frame, episode),
        "index": frame + first,
        "task_index": np.zeros_like(frame),
    }


def _column(values: Array) -> pa.Array:
    if values.dtype == np.uint8:
        cells = [{"bytes": png, "path": None} for png in encode_pngs(values)]
        return pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    if values.shape[1] == 1:
        return pa.array(values[:, 0])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def encode_pngs(images: npt.NDArray[np.uint8]) -> list[bytes]:
    """uint8 (T, height, width, 3) -> a PNG each."""
    codec = av.CodecContext.create("png", "w")
    assert isinstance(codec, av.VideoCodecContext)  # noqa: S101 - for the type checker
    codec.height, codec.width = images.shape[1:3]
    codec.pix_fmt, codec.time_base, codec.thread_count = "rgb24", Fraction(1), 1
    packets = []
    for number, image in enumerate(images):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = number
        packets += codec.encode(frame)
    packets += codec.encode(None)
    return [bytes(packet) for packet in packets]


def _info(features: Mapping[str, Any], lengths: Sequence[int], fps: float) -> dict[str, Any]:
    return {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(lengths),
        "total_frames": int(sum(lengths)),
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": features,
    }


def _feature(values: Array) -> dict[str, Any]:
    image = values.dtype == np.uint8
    names = ["height", "width", "channels"] if image else None
    dtype = "image" if image else values.dtype.name
    return {"dtype": dtype, "shape": list(values.shape[1:]), "names": names}


def _stats(values: Array) -> dict[str, Any]:
    values = values.astype(np.float64) if values.dtype == np.bool_ else values
    parts = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0, dtype=np.float64)}
    parts["std"] = values.std(0, dtype=np.float64)
    return {name: value.tolist() for name, value in parts.items()} | {"count": [len(values)]}


def _image_stats(levels: Levels) -> dict[str, Any]:
    """Shaped (3, 1, 1), as LeRobot's writer does it."""
    shaped = {
        name: part.reshape(3, 1, 1).tolist() for name, part in levels.statistics(BASIC).items()
    }
    return shaped | {"count": [levels.pixels]}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")
