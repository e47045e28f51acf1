"""Camera frames: from video files or image columns to uint8 arrays, each decoded once."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
import av.error
import numpy as np
import numpy.typing as npt

from vqbet_edge.errors import DatasetError, DiskError
from vqbet_edge.training.dataset.metadata import Clip, DatasetFeature, DatasetInfo
from vqbet_edge.training.dataset.table import Array, Table
from vqbet_edge.training.files import remedy

Frames = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]
IMAGE_ERRORS = (av.error.FFmpegError, StopIteration, IndexError, ValueError)
# FFmpeg goes by a file's content, and a list of files, whatever its name, would make it open those.
_VIDEO = {"format_whitelist": "mov,matroska,webm,avi"}
_IMAGE = {"format_whitelist": "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"}


class Decoder:
    """Decodes a data set's frames as they were recorded; keeps none."""

    def __init__(self, info: DatasetInfo, table: Table) -> None:
        self._info, self._table = info, table
        self._videos = _Videos(info.fps)

    def check(self, keys: Iterable[str]) -> None:
        """Check that all frames of some cameras are in their videos, without decoding any.

        Raises:
            DatasetError: a video is missing, corrupt, too short or of another time.
        """
        videos = [key for key in keys if self._is_video(key)]
        for position, episode in enumerate(self._table.episodes):
            for key in videos:
                clip = self._info.clip(episode, key)
                self._videos.check(clip, self._times(position), episode.index)

    def read(
        self, position: int, key: str, steps: slice = slice(None), at_once: int | None = None
    ) -> Iterator[Frames]:
        """Some frames of the episode at a position, uint8 (T, height, width, 3), in order.

        T is `at_once` of all parts but the last; without it all come together.

        Raises:
            DatasetError: they are corrupt, or not of the promised shape.
        """
        rows = self._table.rows(position)
        wanted = range(rows.stop - rows.start)[steps]
        size = at_once or max(1, len(wanted))
        parts = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        slices = [slice(part.start, part.stop, part.step) for part in parts]
        found = self._from_video if self._is_video(key) else self._from_table
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
        paths = set(self._table.paths)
        if self._is_video(key):
            paths = {self._info.clip(episode, key).path for episode in self._table.episodes}
        facts = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths)]
        return hashlib.sha256(repr((key, facts, *self._info.left_out)).encode()).hexdigest()[:32]

    def _from_video(
        self, position: int, key: str, parts: Sequence[slice]
    ) -> Iterator[tuple[Path, Frames]]:
        episode, seconds = self._table.episodes[position], self._times(position)
        clip = self._info.clip(episode, key)
        for part in parts:
            yield clip.path, self._videos.read(clip, seconds, episode.index, part)

    def _from_table(
        self, position: int, key: str, parts: Sequence[slice]
    ) -> Iterator[tuple[Path, Frames]]:
        path, episode = self._table.files(position)[0], self._table.episodes[position]
        encoded = self._table.images(position, key)
        try:
            for part in parts:
                yield path, np.stack([decode_image(image) for image in encoded[part]])
        except IMAGE_ERRORS as e:
            raise _unreadable(path, episode.index, e) from e

    def _is_video(self, key: str) -> bool:
        return self._info.features[key].dtype == "video"

    @cached_property
    def _seconds(self) -> Array:
        return self._table.vectors("timestamp", DatasetFeature("float32", (1,)))[:, 0]

    def _times(self, position: int) -> Times:
        seconds: Times = self._seconds[self._table.rows(position)].astype(np.float64)
        return seconds


class _Videos:
    """The one that was decoded last stays open.

    It is read forwards without a seek as long as episodes follow each other. Of an episode, `index`
    is for messages, and `seconds` are its frames' times from its beginning.
    """

    def __init__(self, fps: float) -> None:
        self._half = 0.5 / fps
        self._times: dict[Path, Times] = {}
        self._path: Path | None = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._ahead: av.VideoFrame | None = None

    def check(self, clip: Clip, seconds: Times, index: int) -> None:
        if clip.path not in self._times:
            self._times[clip.path] = _packet_times(clip.path, index)
        self._match(self._times[clip.path], clip, seconds, index)

    def read(self, clip: Clip, seconds: Times, index: int, steps: slice) -> Frames:
        number = steps.indices(len(seconds))[0]
        seconds = seconds[steps]
        found: list[float] = []
        frames: list[Frames] = []
        first, last = clip.start + seconds[0], clip.start + seconds[-1]
        try:
            following = self._ahead is not None and abs(self._ahead.time - first) <= self._half
            if self._path != clip.path or not following:
                self._seek(clip.path, first)
            while self._ahead is not None and self._ahead.time <= last + self._half:
                found.append(self._ahead.time)
                frames.append(_rgb(self._ahead))
                self._ahead = next(self._frames, None)
        except (av.error.FFmpegError, IndexError) as e:
            raise _unreadable(clip.path, index, e) from e
        nearest = self._match(np.array(found), clip, seconds, index, number)
        return np.stack(frames)[nearest]

    def _seek(self, path: Path, seconds: float) -> None:
        container = av.open(str(path), mode="r", options=_VIDEO)
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        # A seek lands on the last key frame at or before the wanted time.
        container.seek(int(seconds / _tick(stream)), stream=stream)
        self._path = path
        self._frames = (
            f
            for f in container.decode(stream)
            if f.time is not None and f.time > seconds - self._half
        )
        self._ahead = next(self._frames, None)

    def _match(
        self, found: Times, clip: Clip, seconds: Times, index: int, number: int = 0
    ) -> npt.NDArray[np.intp]:
        """Index of the frame nearest to every wanted time, at most half a frame away.

        Where many episodes share a file, some frame is always that near; clocks that run apart
        show there by frames that are left out or taken twice. The first wanted one has the
        `number` in the episode.
        """
        wanted = clip.start + seconds
        ends = np.concatenate([[-np.inf], found, [np.inf]])
        right = np.searchsorted(found, wanted) + 1
        nearest = np.where(wanted - ends[right - 1] <= ends[right] - wanted, right - 1, right)
        off = np.abs(ends[nearest] - wanted)
        steps = np.diff(nearest)
        uneven = np.append(False, steps != steps[:1])
        missing = ~(off <= self._half) | (uneven & (off > self._half / 4))  # NaN is missing too
        if missing.any():
            first = int(missing.argmax())
            time = wanted[first]
            what = (
                f"it ends at {found.max(initial=0):.3f} s. The file is incomplete, or the data "
                "set's timestamps belong to another video; copy or download both again"
                if not found.size or time > found[-1]
                else f"timestamps and video disagree, the nearest frame is {off[first]:.3f} s away "
                f"where frames are {2 * self._half:.3f} s apart. Correct the column 'timestamp', "
                "or 'fps' in meta/info.json, or leave the camera out with --cameras"
            )
            raise DatasetError(
                f"{clip.path}: frame {number + first} of episode {index} (at {time:.3f} s) is not "
                f"in the video: {what}"
            )
        return nearest - 1


def _packet_times(path: Path, index: int) -> Times:
    try:
        with av.open(str(path), mode="r", options=_VIDEO) as container:
            stream = container.streams.video[0]
            ticks = [p.pts for p in container.demux(stream) if p.pts is not None and p.size]
            seconds: Times = np.sort(np.array(ticks, dtype=np.float64)) * _tick(stream)
            return seconds
    except (av.error.FFmpegError, IndexError) as e:
        raise _unreadable(path, index, e) from e


def decode_image(encoded: bytes) -> Frames:
    """A PNG or JPEG file -> uint8 (height, width, 3); one of `IMAGE_ERRORS` if it is none."""
    with av.open(io.BytesIO(encoded), mode="r", options=_IMAGE) as container:
        return _rgb(next(container.decode(video=0)))


def _unreadable(path: Path, index: int, error: Exception) -> DatasetError:
    return DatasetError(f"{path}: episode {index} is corrupt ({error}); {remedy(path)}")


def _rgb(frame: av.VideoFrame) -> Frames:
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def _tick(stream: av.VideoStream) -> float:
    """Seconds per unit of a stream's time stamps."""
    if stream.time_base is None:
        raise IndexError("the video has no time base")
    return float(stream.time_base)


def cached_frames(parts: Iterable[Frames], shape: tuple[int, ...], path: Path | None) -> Frames:
    """All frames as one array.

    Args:
        parts: the frames in order; not touched when `path` exists.
        shape: (frames, height, width, 3) of the result.
        path: the .npy file to keep them in; None keeps them in memory.

    Raises:
        DiskError: the cache cannot be written, or is not what was written.
    """
    if path is None:
        return _fill(iter(parts), shape)
    try:
        if not path.is_file():
            _write(parts, shape, path)
        frames = _mapped(path)
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


def _mapped(path: Path) -> Frames:
    # Not `np.load`, which opens archives and pickles too.
    try:
        return np.lib.format.open_memmap(path, mode="c")
    except OSError:
        raise
    except Exception as e:  # a header is Python's text, and fails as such and as its numbers do
        raise ValueError(str(e)) from e


def _fill(parts: Iterator[Frames], shape: tuple[int, ...]) -> Frames:
    first = list(islice(parts, 1))
    # Not before a frame of that size was seen: meta/ may promise any.
    frames: Frames = np.empty(shape, np.uint8)
    start = 0
    for part in chain(first, parts):
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
