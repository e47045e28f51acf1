"""Recording what the robot really sees, to calibrate INT8 and to verify on later.

A recording is a folder of safetensors files, `observations_000000.safetensors` and on. Each holds
consecutive observations:

    episode                  int64   (T,)            grows by one at every reset
    <camera key>             uint8   (T, H, W, 3)
    <state key>              float32 (T, S)          in the robot's units

Every file is complete when it gets its name, so a robot that is switched off loses the newest few
observations only.
"""

import logging
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from vqbet_edge.errors import DiskError, UsageError
from vqbet_edge.runtime.manifest import Manifest

EPISODE = "episode"
FILE_PATTERN = "observations_*.safetensors"
_FILE_BYTES = 8 << 20
_LOG = logging.getLogger(__name__)

Array = NDArray[Any]


class Recorder:
    """Writes observations to a folder until a size limit is reached.

    Files are written by a thread of their own: acting never waits for the disk. A disk that fails
    ends the recording, not the robot's work; `close` reports it.
    """

    def __init__(self, manifest: Manifest, folder: Path, max_bytes: int) -> None:
        """See `EdgePolicy.record`."""
        self._manifest, self._folder = manifest, folder
        frames = math.prod(manifest.image_shape) * len(manifest.image_keys)
        self._row_bytes = frames + manifest.state_dim * 4
        self._rows_left = max_bytes // self._row_bytes
        if self._rows_left < 1:
            raise UsageError(
                f"one observation has {self._row_bytes} bytes, more than the limit of {max_bytes}"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.glob(FILE_PATTERN)):
                raise UsageError(f"'{folder}' holds a recording already; choose another folder")
        except OSError as error:
            raise DiskError(f"cannot record to '{folder}': {error.strerror}") from error
        self._episode, self._files = 0, 0
        self._rows: list[dict[str, Array]] = []
        self._writer = ThreadPoolExecutor(1)
        self._error: DiskError | None = None

    def begin_episode(self) -> None:
        """What follows is a new episode."""
        self._episode += 1

    def append(self, observation: Mapping[str, Any]) -> None:
        """Take a copy of an observation that has been checked; nothing once the limit is met."""
        if self._rows_left == 0:
            return
        manifest = self._manifest
        row: dict[str, Array] = {
            key: _frame(np.asarray(observation[key])) for key in manifest.image_keys
        }
        state = np.array(observation[manifest.state_key], np.float32).reshape(-1)
        row |= {manifest.state_key: state, EPISODE: np.array(self._episode)}
        self._rows.append(row)
        self._rows_left -= 1
        if self._rows_left == 0:
            _LOG.warning("the recording in '%s' is full; nothing more is recorded", self._folder)
        if self._rows_left == 0 or len(self._rows) * self._row_bytes >= _FILE_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left and stop.

        Raises:
            DiskError: something could not be written.
        """
        self._flush()
        self._rows_left = 0
        self._writer.shutdown()
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        if self._rows:
            path = self._folder / FILE_PATTERN.replace("*", f"{self._files:06}")
            self._writer.submit(self._write, path, self._rows)
            self._files += 1
        self._rows = []

    def _write(self, path: Path, rows: list[dict[str, Array]]) -> None:
        arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(save(arrays))
            partial.rename(path)
        except OSError as error:
            self._error = DiskError(f"cannot write '{path}': {error.strerror}; recording has ended")
            self._rows_left = 0
            _LOG.warning("%s", self._error)


def _frame(image: Array) -> NDArray[np.uint8]:
    """A copy as uint8 (H, W, 3)."""
    image = image.reshape(image.shape[-3:])
    if image.dtype == np.uint8:
        return image.copy()
    return np.rint(np.moveaxis(image, -3, -1) * np.float32(255)).astype(np.uint8)
