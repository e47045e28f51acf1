"""Camera frames: from video files or image columns to uint8 arrays, each decoded once."""

import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
import av.error
import numpy as np
import numpy.typing as npt

from vqbet_edge.errors import DatasetError, DiskError
from vqbet_edge.training.dataset.metadata import Clip
from vqbet_edge.training.files import remedy

Frames = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]
# FFmpeg goes by a file's content, and a list of files, whatever its name, would make it open those.
_VIDEO = {"format_whitelist": "mov,matroska,webm,avi"}
_IMAGE = {"format_whitelist": "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"}


class Videos:
    """The video files of one data set.

    The one that was decoded last stays open and is read forwards without a seek as long as
    episodes follow each other.

    Args:
        fps: frames per second.
    """

    def __init__(self, fps: float) -> None:
        self._half = 0.5 / fps
        self._times: dict[Path, Times] = {}
        self._path: Path | None = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._ahead: av.VideoFrame | None = None

    def check(self, clip: Clip, seconds: Times, episode: int) -> None:
        """Check that frames are in a video, without decoding any.

        Args:
            clip: where the episode's frames are.
            seconds: of its frames, from the episode's beginning.
            episode: its index, for the message.

        Raises:
            DatasetError: the video is corrupt, too short or of another time.
        """
        if clip.path not in self._times:
            self._times[clip.path] = _packet_times(clip.path, episode)
        self._match(self._times[clip.path], clip, seconds, episode)

    def read(self, clip: Clip, seconds: Times, episode: int, steps: slice = slice(None)) -> Frames:
        """Decode some of them, uint8 (T, height, width, 3).

        Arguments and errors are those of `check`.
        """
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
            raise unreadable(clip.path, episode, e) from e
        nearest = self._match(np.array(found), clip, seconds, episode, number)
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
        self, found: Times, clip: Clip, seconds: Times, episode: int, number: int = 0
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
            raise DatasetError(
                f"{clip.path}: frame {number + first} of episode {episode} (at "
                f"{wanted[first]:.3f} s) is not in the video: "
                f"{self._apart(found, wanted[first], off[first])}"
            )
        return nearest - 1

    def _apart(self, found: Times, wanted: float, off: float) -> str:
        if not found.size or wanted > found[-1]:
            return (
                f"it ends at {found.max(initial=0):.3f} s. The file is incomplete, or the data "
                "set's timestamps belong to another video; copy or download both again"
            )
        return (
            f"timestamps and video disagree, the nearest frame is {off:.3f} s away where frames "
            f"are {2 * self._half:.3f} s apart. Correct the column 'timestamp', or 'fps' in "
            "meta/info.json, or leave the camera out with --cameras"
        )


def _packet_times(path: Path, episode: int) -> Times:
    """The seconds of all frames of a video."""
    try:
        with av.open(str(path), mode="r", options=_VIDEO) as container:
            stream = container.streams.video[0]
            ticks = [p.pts for p in container.demux(stream) if p.pts is not None and p.size]
            seconds: Times = np.sort(np.array(ticks, dtype=np.float64)) * _tick(stream)
            return seconds
    except (av.error.FFmpegError, IndexError) as e:
        raise unreadable(path, episode, e) from e


def decode_image(encoded: bytes) -> Frames:
    """A PNG or JPEG file -> uint8 (height, width, 3).

    Raises:
        FFmpegError, StopIteration, IndexError, ValueError: it is none.
    """
    with av.open(io.BytesIO(encoded), mode="r", options=_IMAGE) as container:
        return _rgb(next(container.decode(video=0)))


IMAGE_ERRORS = (av.error.FFmpegError, StopIteration, IndexError, ValueError)


def unreadable(path: Path, episode: int, error: Exception) -> DatasetError:
    """What to say about a file of frames that cannot be decoded."""
    return DatasetError(f"{path}: episode {episode} is corrupt ({error}); {remedy(path)}")


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


def _fill(parts: Iterable[Frames], shape: tuple[int, ...]) -> Frames:
    remaining = iter(parts)
    first = list(islice(remaining, 1))
    # Not before a frame of that size was seen: meta/ may promise any.
    frames: Frames = np.empty(shape, np.uint8)
    start = 0
    for part in chain(first, remaining):
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
