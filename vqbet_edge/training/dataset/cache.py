"""Decoded frames, kept so that no frame is decoded twice."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

from vqbet_edge.errors import DiskError
from vqbet_edge.training.dataset.frames import Frames


def cached_frames(parts: Iterable[Frames], shape: tuple[int, ...], path: Path | None) -> Frames:
    """All frames as one array.

    Args:
        parts: the frames episode by episode; not touched when `path` exists.
        shape: (frames, height, width, 3) of the result.
        path: the .npy file to keep them in; None keeps them in memory.

    Raises:
        DiskError: the cache cannot be written.
    """
    if path is None:
        return _fill(parts, shape)
    try:
        if not path.is_file():
            _write(parts, shape, path)
        # Not `np.load`, which opens archives and pickles too.
        frames: Frames = np.lib.format.open_memmap(path, mode="c")
        if frames.shape != shape or frames.dtype != np.uint8:
            raise ValueError(f"it holds {frames.dtype} {frames.shape}, expected uint8 {shape}")
    except ValueError as e:
        raise DiskError(
            f"{path} is not the cache that was written ({e}); delete it, it is made anew"
        ) from e
    except OSError as e:
        raise DiskError(
            f"cannot keep decoded frames in {path.parent}: {e}. "
            f"They need {np.prod(shape) / 1e9:.1f} GB; free space or choose another cache folder"
        ) from e
    return frames


def _fill(parts: Iterable[Frames], shape: tuple[int, ...]) -> Frames:
    frames: Frames = np.empty(shape, np.uint8)
    start = 0
    for part in parts:
        frames[start : start + len(part)] = part
        start += len(part)
    return frames


def _write(parts: Iterable[Frames], shape: tuple[int, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Plain writes, not a memory map: on a full disk those raise, a memory map kills the process.
    with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
        except BaseException:
            temporary.unlink()
            raise
    temporary.replace(path)
