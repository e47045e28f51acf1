"""The parquet files under `data/`: which rows are which frames, and columns of them.

Where `meta/` says that an episode lies is not asked: conversions and merges leave that stale. As
LeRobot does, all files are read, and every row says itself to which episode it belongs.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset.metadata import DatasetFeature, DatasetInfo, EpisodeInfo
from vqbet_edge.training.files import remedy

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
_NUMBER = DatasetFeature("int64", (1,))
TIME = "timestamp"
_NUMBERS = "episode_index", "frame_index"
_FILE = "__fragment_index"  # Arrow's own column


class Table:
    """All frames, episode by episode: episode i is frames `bounds[i]` to `bounds[i + 1]`.

    Raises:
        DatasetError: a file is unreadable, or an episode is not whole.
    """

    def __init__(self, info: DatasetInfo, keys: Sequence[str] = ()) -> None:
        """Read which rows are which frames, and some columns that will be asked for.

        A data set may have thousands of files, and opening one costs more than reading it.
        """
        self.paths = tuple(sorted((info.root / "data").glob("*/*.parquet")))
        if not self.paths:
            raise DatasetError(f"no file data/*/*.parquet in {info.root}; copy the data set again")
        self._read = _read_all(self.paths, [*_NUMBERS, *keys])
        numbers = [
            [_to_array(part.where, part.rows[key], _NUMBER, key)[:, 0] for key in _NUMBERS]
            for part in self._read
        ]
        index, frame = np.concatenate(numbers, axis=1).astype(np.int64)
        order = np.lexsort((frame, index))
        self._order = order[~np.isin(index[order], info.left_out)] if info.left_out else order
        self._files = np.concatenate([part.files for part in self._read])
        index, frame = index[self._order], frame[self._order]
        self.episodes = tuple(e for e in info.episodes if e.length or e.index in index)
        firsts = np.searchsorted(index, [e.index for e in self.episodes])
        self.bounds: Indices = np.append(firsts, len(index)).astype(np.int64)
        strange = np.setdiff1d(index, [e.index for e in self.episodes])
        if strange.size:
            raise DatasetError(
                f"{info.root / 'data'} has frames of episode {strange[0]}, which "
                f"{info.root / 'meta'} does not list; copy the data set again"
            )
        for position, episode in enumerate(self.episodes):
            self._check(position, episode, frame)

    def rows(self, position: int) -> slice:
        """The frames of an episode."""
        return slice(int(self.bounds[position]), int(self.bounds[position + 1]))

    def files(self, position: int) -> list[Path]:
        """The files that hold an episode; most often one."""
        rows = self._order[self.rows(position)]
        return [self.paths[number] for number in np.unique(self._files[rows])]

    def _check(self, position: int, episode: EpisodeInfo, frame: Indices) -> None:
        frames = frame[self.rows(position)]
        if len(frames) < episode.length:
            raise DatasetError(
                f"{self._where(position)}: episode {episode.index} has {len(frames)} frames, meta/ "
                f"says {episode.length}; copy the data set again or delete the episode"
            )
        # An episode whose beginning was cut off keeps its numbers, and its times in the video.
        wrong = np.flatnonzero(np.diff(frames) != 1)
        if wrong.size:
            raise DatasetError(
                f"{self._where(position)}: the frames of episode {episode.index} are not numbered "
                f"one by one: frame {frames[wrong[0]] + 1} is missing, or {frames[wrong[0]]} is "
                "there twice; "
                "copy the data set again or delete the episode"
            )

    def _where(self, position: int) -> str:
        return ", ".join(map(str, self.files(position))) or str(self.paths[0].parents[1])

    @cached_property
    def seconds(self) -> Array:
        """float32 (frames,): every frame's time from its episode's beginning.

        Raises:
            DatasetError: it is missing, incomplete or not finite.
        """
        return self.vectors(TIME, DatasetFeature("float32", (1,)))[:, 0]

    def vectors(self, key: str, feature: DatasetFeature) -> Array:
        """(frames, dim): a column of numbers, floats as float32.

        Raises:
            DatasetError: it is missing, incomplete or not finite.
        """
        known = key in self._read[0].rows.column_names
        read = self._read if known else _read_all(self.paths, [key])
        parts = [_to_array(part.where, part.rows[key], feature, key) for part in read]
        if known:  # it is asked for once
            self._read = [p._replace(rows=p.rows.drop_columns([key])) for p in read]
        values: Array = np.concatenate(parts)[self._order]
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            frame = int(finite.argmin())
            position = int(np.searchsorted(self.bounds, frame, side="right")) - 1
            raise DatasetError(
                f"{self.files(position)[0]}: '{key}' of episode {self.episodes[position].index} "
                f"is not finite at frame {frame - self.bounds[position]}; repair or delete the "
                "episode"
            )
        return values.astype(np.float32) if values.dtype.kind == "f" else values

    def images(self, position: int, key: str) -> list[bytes]:
        """The encoded images of one episode.

        Raises:
            DatasetError: one is missing.
        """
        index = self.episodes[position].index
        encoded: dict[int, bytes] = {}
        for path in self.files(position):
            wanted = pc.field("episode_index") == index
            try:
                table = pq.read_table(path, columns=["frame_index", key], filters=wanted)
                cells = [cell["bytes"] for cell in table[key].to_pylist()]
            except (OSError, pa.ArrowException, KeyError, TypeError) as e:
                raise DatasetError(
                    f"{path}: images '{key}' of episode {index} are unreadable: {e}"
                ) from e
            encoded |= dict(zip(table["frame_index"].to_pylist(), cells, strict=True))
            if None in cells:
                raise DatasetError(
                    f"{path}: episode {index} lacks images of '{key}'; they have to be embedded "
                    "in the file, as LeRobot's writer does it"
                )
        return [encoded[frame] for frame in sorted(encoded)]


class _Part(NamedTuple):
    """Some columns of one file, or of all."""

    where: Path  # for messages
    rows: pa.Table
    files: Indices  # the number of each row's file


def _read_all(paths: Sequence[Path], keys: Sequence[str]) -> list[_Part]:
    """The columns of all files, in their order.

    Raises:
        DatasetError: a file is unreadable or lacks a column.
    """
    names = [str(path) for path in paths]
    try:
        files = ds.dataset(names, format="parquet", filesystem=LocalFileSystem())
        rows = files.to_table(columns=[*keys, _FILE])
        # What one file lacks and the first one has.
        if not any(rows[key].null_count for key in keys):
            number = rows[_FILE].to_numpy().astype(np.int64)
            return [_Part(paths[0].parents[1], rows, number)]
    except (OSError, pa.ArrowException):
        pass  # file by file: which one it is, or that they only differ in their types
    parts: list[_Part] = []
    first = 0
    for number, path in enumerate(paths):
        try:
            with pq.ParquetFile(path) as file:
                rows = file.read(list(keys)).select(list(keys))
        except (OSError, pa.ArrowException, KeyError) as e:
            raise DatasetError(
                f"{path} (from episode {first} on) is corrupt or incomplete: {e}; {remedy(path)}"
            ) from e
        parts.append(_Part(path, rows, np.full(len(rows), number)))
        if _NUMBERS[0] in keys and len(rows):
            first = 1 + (pc.max(rows[_NUMBERS[0]]).as_py() or 0)
    return parts


def _to_array(path: Path, column: pa.ChunkedArray, feature: DatasetFeature, key: str) -> Array:
    """(rows, dim); what is missing is NaN."""
    values = column.combine_chunks()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise DatasetError(f"{path}: '{key}' holds {values.type}, expected numbers")
    array: Array = values.to_numpy(zero_copy_only=False)
    if array.size != len(column) * feature.shape[0]:
        raise DatasetError(
            f"{path}: '{key}' has {array.size} numbers, expected {len(column)} frames of "
            f"{feature.shape[0]}; copy the data set again"
        )
    return array.reshape(len(column), *feature.shape)
