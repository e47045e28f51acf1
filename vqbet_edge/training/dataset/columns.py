"""States, actions and other vectors of a data set, from its parquet files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset.metadata import DatasetFeature, DatasetInfo, EpisodeInfo

Array = npt.NDArray[Any]


def vector_keys(info: DatasetInfo) -> list[str]:
    """Keys of all columns of numbers with a shape of one axis."""
    return [
        key
        for key, feature in info.features.items()
        if len(feature.shape) == 1 and not feature.is_image and feature.dtype != "string"
    ]


def read_columns(info: DatasetInfo) -> dict[str, Array]:
    """Read every column of numbers, all episodes one after the other.

    Returns:
        Per key an array (frames, dim), or (frames, 1) for numbers.

    Raises:
        DatasetError: a file is unreadable, an episode incomplete, or a value not finite; the
            message names the file and the episode.
    """
    keys = vector_keys(info)
    parts: dict[str, list[Array]] = {key: [] for key in keys}
    path = Path()
    file: dict[str, Array] = {}
    for episode in info.episodes:
        if episode.data_path != path:
            path, file = episode.data_path, _read_file(info, episode, keys)
        rows = np.flatnonzero(file["episode_index"][:, 0] == episode.index)
        _check_rows(rows, file, episode)
        for key in keys:
            values = file[key][rows]
            _check_finite(values, episode, key)
            parts[key].append(values)
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}


def read_images(episode: EpisodeInfo, key: str) -> list[bytes]:
    """Encoded images of one episode from an image column."""
    try:
        table = pq.read_table(
            episode.data_path, columns=[key], filters=pc.field("episode_index") == episode.index
        )
        encoded = [cell["bytes"] for cell in table[key].to_pylist()]
    except (OSError, pa.ArrowException, KeyError, TypeError) as e:
        raise DatasetError(
            f"{episode.data_path}: images '{key}' of episode {episode.index} are unreadable: {e}"
        ) from e
    if None in encoded or len(encoded) != episode.length:
        raise DatasetError(
            f"{episode.data_path}: episode {episode.index} lacks images of '{key}' "
            f"(expected {episode.length} embedded images)"
        )
    return encoded


def _read_file(info: DatasetInfo, first: EpisodeInfo, keys: Sequence[str]) -> dict[str, Array]:
    try:
        table = pq.read_table(first.data_path, columns=list(keys))
        return {key: _to_array(table, info.features[key], first, key) for key in keys}
    except (OSError, pa.ArrowException, KeyError) as e:
        raise DatasetError(
            f"{first.data_path} (from episode {first.index} on) is corrupt or incomplete: {e}; "
            "copy or download it again"
        ) from e


def _to_array(table: pa.Table, feature: DatasetFeature, first: EpisodeInfo, key: str) -> Array:
    values = table[key].combine_chunks()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    array: Array = values.to_numpy(zero_copy_only=False)
    if array.size != len(table) * feature.shape[0]:
        raise DatasetError(
            f"{first.data_path} (from episode {first.index} on): '{key}' has {array.size} numbers, "
            f"expected {len(table)} frames of {feature.shape[0]}; copy the data set again"
        )
    array = array.reshape(len(table), *feature.shape)
    return array.astype(np.float32) if feature.dtype.startswith("float") else array


def _check_rows(
    rows: npt.NDArray[np.intp], file: Mapping[str, Array], episode: EpisodeInfo
) -> None:
    if len(rows) != episode.length or episode.length == 0:
        raise DatasetError(
            f"{episode.data_path}: episode {episode.index} has {len(rows)} frames, "
            f"meta/ says {episode.length}; copy the data set again or delete the episode"
        )
    if not np.array_equal(file["frame_index"][rows, 0], np.arange(len(rows))):
        raise DatasetError(
            f"{episode.data_path}: the frames of episode {episode.index} are not 0, 1, 2, ...; "
            "sort the file by frame_index"
        )


def _check_finite(values: Array, episode: EpisodeInfo, key: str) -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise DatasetError(
            f"{episode.data_path}: '{key}' of episode {episode.index} is not finite at frame "
            f"{int(finite.argmin())}; repair or delete the episode"
        )
