"""The parquet files under `data/`: which rows are which frames, and columns of them.

Where `meta/` says that an episode lies is not asked: conversions and merges leave that stale. As
LeRobot does, all files are read, and every row says itself to which episode it belongs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset.metadata import DatasetFeature, DatasetInfo, EpisodeInfo
from vqbet_edge.training.files import remedy

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
_NUMBER = DatasetFeature("int64", (1,))


class Table:
    """All frames, episode by episode: episode i is frames `bounds[i]` to `bounds[i + 1]`.

    Raises:
        DatasetError: a file is unreadable, or an episode is not whole.
    """

    def __init__(self, info: DatasetInfo) -> None:
        self.paths = tuple(sorted((info.root / "data").glob("*/*.parquet")))
        if not self.paths:
            raise DatasetError(f"no file data/*/*.parquet in {info.root}; copy the data set again")
        parts: list[Array] = []
        for path in self.paths:
            first = 1 + max((int(part[0].max(initial=-1)) for part in parts), default=-1)
            read = _read(path, ["episode_index", "frame_index"], f" (from episode {first} on)")
            numbers = [_to_array(path, read[key], _NUMBER, key)[:, 0] for key in read.column_names]
            parts.append(np.stack(numbers).astype(np.int64))
        index, frame = np.concatenate(parts, axis=1)
        order = np.lexsort((frame, index))
        self._order = order[~np.isin(index[order], info.left_out)] if info.left_out else order
        self._files = np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts])
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
        where = ", ".join(map(str, self.files(position))) or self.paths[0].parents[1]
        if len(frames) < episode.length:
            raise DatasetError(
                f"{where}: episode {episode.index} has {len(frames)} frames, meta/ says "
                f"{episode.length}; copy the data set again or delete the episode"
            )
        # An episode whose beginning was cut off keeps its numbers, and its times in the video.
        wrong = np.flatnonzero(np.diff(frames) != 1)
        if wrong.size:
            raise DatasetError(
                f"{where}: the frames of episode {episode.index} are not numbered one by one: "
                f"frame {frames[wrong[0]] + 1} is missing, or {frames[wrong[0]]} is there twice; "
                "copy the data set again or delete the episode"
            )

    def vectors(self, key: str, feature: DatasetFeature) -> Array:
        """(frames, dim): a column of numbers, floats as float32.

        Raises:
            DatasetError: it is missing, incomplete or not finite.
        """
        parts = [_to_array(path, _read(path, [key])[key], feature, key) for path in self.paths]
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


def _read(path: Path, keys: Sequence[str], where: str = "") -> pa.Table:
    try:
        return pq.read_table(path, columns=list(keys)).select(list(keys))
    except (OSError, pa.ArrowException, KeyError) as e:
        raise DatasetError(f"{path}{where} is corrupt or incomplete: {e}; {remedy(path)}") from e


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
