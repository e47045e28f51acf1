"""Camera frames: from video files or image columns to uint8 arrays."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import av.error
import numpy as np
import numpy.typing as npt

from vqbet_edge.errors import DatasetError
from vqbet_edge.training.dataset.columns import read_images
from vqbet_edge.training.dataset.metadata import DatasetInfo, EpisodeInfo

Frames = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]


def check_videos(info: DatasetInfo, times: Sequence[Times]) -> None:
    """Check that every episode's frames are in its video file, without decoding any.

    Args:
        info: the data set.
        times: per episode the seconds of its frames, from the episode's beginning.

    Raises:
        DatasetError: a video is corrupt or too short; names the file and the episode.
    """
    known: dict[Path, Times] = {}
    for episode, seconds in zip(info.episodes, times, strict=True):
        for clip in episode.clips.values():
            if clip.path not in known:
                known[clip.path] = _packet_times(clip.path, episode)
            _match(known[clip.path], clip.start + seconds, 1 / info.fps, clip.path, episode)


def iter_episode_frames(
    info: DatasetInfo, key: str, episodes: Sequence[int], times: Sequence[Times]
) -> Iterator[Frames]:
    """Decode the given episodes' frames of one camera.

    Args:
        info: the data set.
        key: the camera.
        episodes: positions in `info.episodes`.
        times: per position the seconds of the frames, from the episode's beginning.

    Yields:
        Per episode uint8 (frames, height, width, 3), RGB.

    Raises:
        DatasetError: frames are corrupt, missing or of another shape.
    """
    video: _Video | None = None
    for position, seconds in zip(episodes, times, strict=True):
        episode = info.episodes[position]
        if key in episode.clips:
            path, start = episode.clips[key]
            if video is None or video.path != path:
                video = _Video(path, info.fps)
            frames = video.read(start + seconds, episode)
        else:
            frames, path = _decode_images(episode, key), episode.data_path
        expected = (episode.length, *info.features[key].shape)
        if frames.shape != expected:
            raise DatasetError(
                f"{path}: '{key}' of episode {episode.index} decodes to {frames.shape}, "
                f"expected {expected}"
            )
        yield frames


class _Video:
    """One video file, read forwards without a seek as long as episodes follow each other."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self._half = 0.5 / fps
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._ahead: av.VideoFrame | None = None

    def read(self, wanted: Times, episode: EpisodeInfo) -> Frames:
        """The frames at the wanted seconds."""
        found: list[float] = []
        frames: list[Frames] = []
        try:
            if self._ahead is None or abs(self._ahead.time - wanted[0]) > self._half:
                self._seek(wanted[0])
            while self._ahead is not None and self._ahead.time <= wanted[-1] + self._half:
                found.append(self._ahead.time)
                frames.append(_rgb(self._ahead))
                self._ahead = next(self._frames, None)
        except (av.error.FFmpegError, IndexError) as e:
            raise _unreadable(self.path, episode, e) from e
        nearest = _match(np.array(found), wanted, 2 * self._half, self.path, episode)
        return np.stack(frames)[nearest]

    def _seek(self, seconds: float) -> None:
        container = av.open(str(self.path), mode="r")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        # A seek lands on the last key frame at or before the wanted time.
        container.seek(int(seconds / _tick(stream)), stream=stream)
        self._frames = (
            f
            for f in container.decode(stream)
            if f.time is not None and f.time > seconds - self._half
        )
        self._ahead = next(self._frames, None)


def _decode_images(episode: EpisodeInfo, key: str) -> Frames:
    frames = []
    try:
        for encoded in read_images(episode, key):
            with av.open(io.BytesIO(encoded), mode="r") as container:
                frames.append(_rgb(next(container.decode(video=0))))
        return np.stack(frames)
    except (av.error.FFmpegError, StopIteration, IndexError, ValueError) as e:
        raise _unreadable(episode.data_path, episode, e) from e


def _rgb(frame: av.VideoFrame) -> Frames:
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def _tick(stream: av.VideoStream) -> float:
    """Seconds per unit of a stream's time stamps."""
    if stream.time_base is None:
        raise IndexError("the video has no time base")
    return float(stream.time_base)


def _packet_times(path: Path, episode: EpisodeInfo) -> Times:
    try:
        with av.open(str(path), mode="r") as container:
            stream = container.streams.video[0]
            ticks = [p.pts for p in container.demux(stream) if p.pts is not None and p.size]
            seconds: Times = np.sort(np.array(ticks, dtype=np.float64)) * _tick(stream)
            return seconds
    except (av.error.FFmpegError, IndexError) as e:
        raise _unreadable(path, episode, e) from e


def _match(
    found: Times, wanted: Times, period: float, path: Path, episode: EpisodeInfo
) -> npt.NDArray[np.intp]:
    """Index of the frame nearest to every wanted time; `period` is the seconds between frames."""
    if found.size:
        right = np.searchsorted(found, wanted).clip(1, max(found.size - 1, 1))
        left = right - 1
        right = right.clip(max=found.size - 1)
        nearest = np.where(wanted - found[left] <= found[right] - wanted, left, right)
        missing = np.abs(found[nearest] - wanted) > period / 2
    if not found.size or missing.any():
        frame = 0 if not found.size else int(missing.argmax())
        raise DatasetError(
            f"{path}: frame {frame} of episode {episode.index} (at {wanted[frame]:.3f} s) is not "
            "in the video; the file is incomplete, copy or download it again"
        )
    return nearest


def _unreadable(path: Path, episode: EpisodeInfo, error: Exception) -> DatasetError:
    return DatasetError(
        f"{path}: episode {episode.index} is corrupt ({error}); copy or download the file again"
    )
