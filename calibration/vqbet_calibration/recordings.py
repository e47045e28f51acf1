"""Observations that `EdgePolicy.record` wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.recording import EPISODE, FILE_PATTERN

Array = NDArray[Any]


class Recordings:
    """Recorded episodes; see `vqbet_edge.runtime.recording` for the files.

    Of a batch of robots, every robot's observations are an episode of their own.
    """

    def __init__(self, arrays: dict[str, Array]) -> None:
        episodes = arrays.pop(EPISODE)
        self._arrays = arrays
        self._robots = next(iter(arrays.values())).shape[1]
        cuts = np.flatnonzero(np.diff(episodes)) + 1
        self._bounds = [0, *cuts.tolist(), len(episodes)]
        self.lengths: Sequence[int] = np.repeat(np.diff(self._bounds), self._robots).tolist()

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Whether a folder holds recordings."""
        return folder.is_dir() and any(folder.glob(FILE_PATTERN))

    @classmethod
    def open(cls, folder: Path) -> "Recordings":
        """Read all files of a folder.

        Raises:
            DatasetError: a file is damaged, or they do not fit together.
        """
        files = sorted(folder.glob(FILE_PATTERN))
        try:
            parts = [load_file(path) for path in files]
            joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DatasetError(
                f"the recordings in '{folder}' cannot be read: {error}; record again"
            ) from error
        if EPISODE not in joined or len({len(value) for value in joined.values()}) != 1:
            raise DatasetError(f"'{folder}' holds no recordings of observations; record again")
        return cls(joined)

    def load(self, episode: int, keys: Sequence[str]) -> dict[str, Array]:
        """See `samples.Episodes`."""
        missing = [key for key in keys if key not in self._arrays]
        if missing:
            raise DatasetError(
                f"the recordings lack {missing}, which the policy observes; they have "
                f"{sorted(self._arrays)}"
            )
        position, robot = divmod(episode, self._robots)
        rows = slice(self._bounds[position], self._bounds[position + 1])
        return {key: self._arrays[key][rows, robot] for key in keys}
