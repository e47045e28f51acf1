"""Camera frames of a data set, episode by episode, from wherever they are stored."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset.frames import (
    IMAGE_ERRORS,
    Frames,
    Times,
    Videos,
    decode_image,
    unreadable,
)
from vqbet_edge.training.dataset.metadata import DatasetFeature, DatasetInfo
from vqbet_edge.training.dataset.table import Array, Table

_Found = Iterator[tuple[Path, Frames]]


class Decoder:
    """Decodes frames as they were recorded; keeps none.

    Args:
        info: of the data set.
        table: its rows, with the images that are no videos.
    """

    def __init__(self, info: DatasetInfo, table: Table) -> None:
        self._info, self._table = info, table
        self._videos = Videos(info.fps)

    def check(self, keys: Iterable[str]) -> None:
        """Check that all frames of some cameras are in their videos, without decoding any.

        Raises:
            DatasetError: they are not.
        """
        videos = [key for key in keys if self._is_video(key)]
        for position, episode in enumerate(self._table.episodes):
            for key in videos:
                clip = self._info.clip(episode, key)
                self._videos.check(clip, self._times(position), episode.index)

    def read(
        self, position: int, key: str, steps: slice = slice(None), at_once: int | None = None
    ) -> Iterator[Frames]:
        """Some frames of an episode, uint8 (T, height, width, 3), in order.

        Args:
            position: of the episode.
            key: the camera.
            steps: which of its frames.
            at_once: T of all parts but the last; None takes all together.

        Raises:
            DatasetError: they are corrupt, or not of the promised shape.
        """
        rows = self._table.rows(position)
        wanted = range(rows.stop - rows.start)[steps]
        size = at_once or max(1, len(wanted))
        parts = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        slices = [slice(part.start, part.stop, part.step) for part in parts]
        found = self._clip if self._is_video(key) else self._images
        shape, index = self._info.features[key].shape, self._table.episodes[position].index
        for path, frames in found(position, key, slices):
            expected = (len(frames), *shape)
            if frames.shape != expected:
                raise DatasetError(
                    f"{path}: '{key}' of episode {index} decodes to {frames.shape}, "
                    f"expected {expected}"
                )
            yield frames

    def digest(self, key: str) -> str:
        """Changes when any file that holds the camera's frames does."""
        if self._is_video(key):
            paths = {self._info.clip(episode, key).path for episode in self._table.episodes}
        else:
            paths = set(self._table.paths)
        facts = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths)]
        return hashlib.sha256(repr((key, facts)).encode()).hexdigest()[:32]

    def _clip(self, position: int, key: str, parts: Sequence[slice]) -> _Found:
        episode, seconds = self._table.episodes[position], self._times(position)
        clip = self._info.clip(episode, key)
        for part in parts:
            yield clip.path, self._videos.read(clip, seconds, episode.index, part)

    def _images(self, position: int, key: str, parts: Sequence[slice]) -> _Found:
        path, episode = self._table.files(position)[0], self._table.episodes[position]
        encoded = self._table.images(position, key)
        try:
            for part in parts:
                yield path, np.stack([decode_image(image) for image in encoded[part]])
        except IMAGE_ERRORS as e:
            raise unreadable(path, episode.index, e) from e

    def _is_video(self, key: str) -> bool:
        return self._info.features[key].dtype == "video"

    @cached_property
    def _seconds(self) -> Array:
        return self._table.vectors("timestamp", DatasetFeature("float32", (1,)))[:, 0]

    def _times(self, position: int) -> Times:
        seconds: Times = self._seconds[self._table.rows(position)].astype(np.float64)
        return seconds
