"""Camera frames: from video files or image columns to uint8 arrays, each decoded once."""

import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.container import InputContainer

from vqbet_edge.errors import DatasetError, DiskError
from vqbet_edge.training.dataset.metadata import Clip, DatasetInfo
from vqbet_edge.training.dataset.table import Table
from vqbet_edge.training.files import remedy

Frames = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]
IMAGE_ERRORS = (av.error.FFmpegError, StopIteration, IndexError, ValueError)
# FFmpeg goes by a file's content, and a list of files, whatever its name, would make it open those.
_VIDEO = {"format_whitelist": "mov,matroska,webm,avi"}
# Opening one takes milliseconds; data sets may have thousands.
_LOOKED_INTO = 128
_IMAGE = {"format_whitelist": "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"}


class Levels:
    """Statistics of channels in [0, 1], over frames that come one after the other."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), np.int64)  # of each level

    def add(self, frames: Iterable[Frames]) -> None:
        """Count the pixels of some frames, uint8 (H, W, 3) each."""
        for frame in frames:
            for channel in range(3):
                self._counts[channel] += np.bincount(frame[..., channel].reshape(-1), minlength=256)

    @property
    def pixels(self) -> int:
        """That were counted."""
        return int(self._counts[0].sum())

    def statistics(self, names: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
        """Of min, max, mean, std and quantiles such as q01 those that are named, (3,) each."""
        levels = np.arange(256) / 255
        share = self._counts / self._counts.sum(axis=1, keepdims=True)
        seen = np.where(self._counts > 0, levels, np.nan)
        mean = share @ levels
        found = {
            "min": np.nanmin(seen, axis=1),
            "max": np.nanmax(seen, axis=1),
            "mean": mean,
            "std": np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1)),
        }
        for name in names:
            if name.startswith("q"):
                # The first level up to which lies the share asked for.
                place = (share.cumsum(axis=1) < int(name[1:]) / 100).sum(axis=1)
                found[name] = levels[place.clip(max=255)]
        return {name: found[name] for name in names}


class Decoder:
    """Decodes a data set's frames as they were recorded; keeps none.

    Args:
        info: what `meta/` says.
        table: which frames there are.
        open_files: videos that stay open; one is enough where episodes follow each other.
        threads: of one video's decoder; None leaves it to FFmpeg.
    """

    def __init__(
        self, info: DatasetInfo, table: Table, open_files: int = 1, threads: int | None = None
    ) -> None:
        self._info, self._table = info, table
        self._videos = _Videos(info.fps, open_files, threads)

    def check(self, keys: Iterable[str]) -> None:
        """Check that all videos of some cameras are there, and that frames are in them.

        Without decoding any. Of many videos some are looked into, spread over all; what is wrong
        with the others is said when they are read.

        Raises:
            DatasetError: a video is missing, corrupt, too short or of another time.
        """
        clips: dict[Path, list[tuple[Clip, int]]] = {}
        for key in filter(self._is_video, keys):
            for position, episode in enumerate(self._table.episodes):
                clip = self._info.clip(episode, key)
                clips.setdefault(clip.path, []).append((clip, position))
        for path in list(clips)[:: -(-len(clips) // _LOOKED_INTO) or 1]:
            for clip, position in clips[path]:
                number = self._table.episodes[position].index
                self._videos.check(clip, self._times(position), number)

    def read(self, position: int, key: str, steps: slice = slice(None)) -> Frames:
        """Some frames of the episode at a position, uint8 (T, height, width, 3), in order.

        Raises:
            DatasetError: they are corrupt, or not of the promised shape.
        """
        found = self._from_video if self._is_video(key) else self._from_table
        path, frames = found(position, key, steps)
        expected = (len(frames), *self._info.features[key].shape)
        if frames.shape != expected:
            raise DatasetError(
                f"{path}: '{key}' of episode {self._table.episodes[position].index} decodes to "
                f"{frames.shape}, expected {expected}"
            )
        return frames

    def digest(self, key: str) -> str:
        """Changes when any file that holds the camera's frames does."""
        paths = set(self._table.paths)
        if self._is_video(key):
            paths = {self._info.clip(episode, key).path for episode in self._table.episodes}
        facts = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths)]
        episodes = [episode.index for episode in self._table.episodes]
        return hashlib.sha256(repr((key, episodes, facts)).encode()).hexdigest()[:32]

    def _from_video(self, position: int, key: str, steps: slice) -> tuple[Path, Frames]:
        episode, seconds = self._table.episodes[position], self._times(position)
        clip = self._info.clip(episode, key)
        return clip.path, self._videos.read(clip, seconds, episode.index, steps)

    def _from_table(self, position: int, key: str, steps: slice) -> tuple[Path, Frames]:
        path, episode = self._table.files(position)[0], self._table.episodes[position]
        encoded = self._table.images(position, key)[steps]
        try:
            return path, np.stack([decode_image(image) for image in encoded])
        except IMAGE_ERRORS as e:
            raise _unreadable(path, episode.index, e) from e

    def _is_video(self, key: str) -> bool:
        return self._info.features[key].dtype == "video"

    def _times(self, position: int) -> Times:
        seconds: Times = self._table.seconds[self._table.rows(position)].astype(np.float64)
        return seconds


class _Video:
    """An open file, decoded up to some frame."""

    def __init__(self, path: Path, threads: int | None) -> None:
        self._container = av.open(str(path), mode="r", options=_VIDEO)
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        if threads is not None:
            self._stream.codec_context.thread_count = threads
        self._frames: Iterator[av.VideoFrame] = iter(())
        self.ahead: av.VideoFrame | None = None

    def seek(self, seconds: float, before: float) -> None:
        """Go to the first frame that is at most `before` seconds before a time."""
        # A seek lands on the last key frame at or before the wanted time.
        self._container.seek(int(seconds / _tick(self._stream)), stream=self._stream)
        self._frames = (
            f
            for f in self._container.decode(self._stream)
            if f.time is not None and f.time > seconds - before
        )
        self.go_on()

    def go_on(self) -> None:
        """Decode one frame."""
        self.ahead = next(self._frames, None)


class _Videos:
    """Those that were decoded last stay open.

    One is read forwards without a seek as long as episodes follow each other. Of an episode,
    `index` is for messages, and `seconds` are its frames' times from its beginning.
    """

    def __init__(self, fps: float, open_files: int, threads: int | None) -> None:
        self._half = 0.5 / fps
        self._times: dict[Path, Times] = {}
        self._open = lru_cache(open_files)(lambda path: _Video(path, threads))

    def check(self, clip: Clip, seconds: Times, index: int) -> None:
        try:
            if clip.path not in self._times:
                self._times[clip.path] = _index_times(clip.path, index)
            self._match(self._times[clip.path], clip, seconds, index)
        except DatasetError:
            # Not every container has an index of all frames in the order in which they are shown.
            self._times[clip.path] = _packet_times(clip.path, index)
            self._match(self._times[clip.path], clip, seconds, index)

    def read(self, clip: Clip, seconds: Times, index: int, steps: slice) -> Frames:
        number = steps.indices(len(seconds))[0]
        seconds = seconds[steps]
        found: list[float] = []
        frames: list[Frames] = []
        first, last = clip.start + seconds[0], clip.start + seconds[-1]
        try:
            video = self._open(clip.path)
            if video.ahead is None or abs(video.ahead.time - first) > self._half:
                video.seek(first, self._half)
            while video.ahead is not None and video.ahead.time <= last + self._half:
                found.append(video.ahead.time)
                frames.append(_rgb(video.ahead))
                video.go_on()
        except (av.error.FFmpegError, IndexError) as e:
            self._open.cache_clear()
            raise _unreadable(clip.path, index, e) from e
        nearest = self._match(np.array(found), clip, seconds, index, number)
        return np.stack(frames)[nearest]

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


def _index_times(path: Path, index: int) -> Times:
    """Times of all frames as the container's index has them; none where it has not all."""
    with _opened(path, index) as container:
        stream = container.streams.video[0]
        entries = list(getattr(stream, "index_entries", ()))  # from PyAV 16 on
        cut = not entries or entries[-1].pos + entries[-1].size > path.stat().st_size
        if cut or len(entries) != stream.frames:
            return np.empty(0)
        ticks = np.array([entry.timestamp for entry in entries], dtype=np.float64)
        seconds: Times = (ticks - ticks[0] + (stream.start_time or 0)) * _tick(stream)
        return seconds


def _packet_times(path: Path, index: int) -> Times:
    with _opened(path, index) as container:
        stream = container.streams.video[0]
        ticks = [p.pts for p in container.demux(stream) if p.pts is not None and p.size]
        seconds: Times = np.sort(np.array(ticks, dtype=np.float64)) * _tick(stream)
        return seconds


@contextmanager
def _opened(path: Path, index: int) -> Iterator[InputContainer]:
    """A video; what is wrong with it, also while it is read, names the file and the episode."""
    try:
        with av.open(str(path), mode="r", options=_VIDEO) as container:
            yield container
    except (av.error.FFmpegError, IndexError, OSError) as e:
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


def kept_frames(
    decoded: Callable[[int], Iterable[Frames]], shape: tuple[int, ...], path: Path | None
) -> Frames:
    """All frames as one array.

    Args:
        decoded: the frames from that number on, in order; not called when `path` exists.
        shape: (frames, height, width, 3) of the result.
        path: the .npy file to keep them in, read-only; None keeps them in memory. A decoding that
            is interrupted is gone on with, and one that another process is at is waited for.

    Raises:
        DiskError: the cache cannot be written, or is not what was written.
    """
    if path is None:
        return _fill(iter(decoded(0)), shape)
    try:
        if not path.is_file():
            _write(decoded, shape, path)
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
        return np.lib.format.open_memmap(path, mode="r")
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


def _write(decoded: Callable[[int], Iterable[Frames]], shape: tuple[int, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    begin, size = header.tell(), int(np.prod(shape[1:]))
    partial = path.with_suffix(".partial")
    # Plain writes, not a memory map: on a full disk those raise, a memory map kills the process.
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.is_file():  # by the process that was waited for
            partial.unlink(missing_ok=True)
            return
        done = max(0, file.tell() - begin) // size
        file.truncate(begin + done * size if done else 0)
        if not done:
            file.write(header.getvalue())
        for part in decoded(done):
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())
        partial.replace(path)
