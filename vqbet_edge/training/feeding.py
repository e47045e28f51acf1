"""Where a batch's camera frames come from: kept in memory or on disk, or decoded on the way.

All three give the same frames bit for bit, so that the choice is one of memory, disk and time.
"""

import atexit
import gc
import math
import multiprocessing
import multiprocessing.util  # whose own end has to be registered before ours
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, tee
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vqbet_edge.errors import DiskError, UsageError, VQBeTEdgeError
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.dataset import Block
from vqbet_edge.training.dataset.frames import Frames
from vqbet_edge.training.dataset.table import Indices

# Of the memory that is free so much is taken for frames.
_SHARE = 0.5
# More processes than that wait for the disk.
_MOST_WORKERS = 8
# Fewer blocks than that are decoded before processes have started.
_FEW_BLOCKS = 64
# Windows that a process decodes at once.
_AT_ONCE = 4
_WORKERS: set[int | None] = set()  # process ids
_GROUPS = Path("/sys/fs/cgroup")
# The smaller side of images that policies mostly look at.
_USUAL = 96


class Windows(NamedTuple):
    """Windows whose frames are decoded together."""

    frames: Indices  # (B, N)


Work: TypeAlias = Block | Windows


@dataclass(frozen=True)
class Feeding:
    """How a run's frames are fed.

    Attributes:
        way: kept in "memory", in a "cache" on disk, or decoded on the way ("stream").
        workers: processes that decode; 0 decodes in this one.
    """

    way: Literal["memory", "cache", "stream"] = "memory"
    workers: int = 0

    @classmethod
    def choose(
        cls, config: TrainConfig, dataset: LeRobotDataset, keys: Sequence[str], processes: int
    ) -> "Feeding":
        """What was asked for, else what fits.

        Args:
            config: of the run.
            dataset: whose frames are fed.
            keys: the cameras.
            processes: of training on this computer; each keeps its own frames in memory.

        Raises:
            UsageError: the options contradict each other, or the frames do not fit into memory.
            DiskError: they do not fit on the disk.
        """
        size = frame_bytes(dataset, keys)
        workers = config.num_workers
        if workers is None:
            workers = min(_MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // processes))
        if config.frame_cache is not None:
            if config.stream_frames:
                raise UsageError(
                    "--stream-frames True decodes frames anew and --frame-cache keeps them; "
                    "pass one of them"
                )
            _check_disk(dataset, keys, config.frame_cache)
            return cls("cache", workers)
        free = available_memory() // processes
        if config.stream_frames is False and size > free:
            raise UsageError(
                f"--stream-frames False keeps {_text(size)} of frames in memory, and "
                f"{_text(free)} are free for each process; leave it out, pass --frame-cache "
                f"FOLDER{_or_smaller(dataset, keys)}"
            )
        stream = config.stream_frames
        if stream is None:
            stream = size > _SHARE * free
        return cls("stream" if stream else "memory", workers)

    def text(self, dataset: LeRobotDataset, keys: Sequence[str]) -> str:
        """What a person who waits is told."""
        size = _text(frame_bytes(dataset, keys))
        by = "by one process" if self.workers < 2 else f"by {self.workers} processes"
        match self.way:
            case "memory":
                return f"{size} of frames: decoded before phase 2 {by}, and kept in memory"
            case "cache":
                return f"{size} of frames: decoded before phase 2 {by}, and kept on disk"
            case "stream":
                return f"{size} of frames: decoded on the way {by}{_or_smaller(dataset, keys)}"


def frame_bytes(dataset: LeRobotDataset, keys: Sequence[str]) -> int:
    """Bytes of all decoded frames of some cameras."""
    return sum(math.prod(dataset.shape(key)) for key in keys)


def available_memory() -> int:
    """Bytes that processes can still take, on this computer and in its control groups."""
    free = [int(psutil.virtual_memory().available)]
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    except OSError:
        return free[0]
    here = _GROUPS / own
    for group in (here, *here.parents):
        if not group.is_relative_to(_GROUPS):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":  # what is cached of files is given back
            free.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
    return min(free)


def _check_disk(dataset: LeRobotDataset, keys: Sequence[str], folder: Path) -> None:
    files = {key: dataset.cache_file(key) for key in keys}
    needed = sum(
        frame_bytes(dataset, [key]) - _size(path.with_suffix(".partial"))
        for key, path in files.items()
        if path is not None and not path.is_file()
    )
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DiskError(
            f"decoded frames need {_text(needed)} in {folder}, and {_text(free)} are free there; "
            f"free space, choose another folder, leave --frame-cache out"
            f"{_or_smaller(dataset, keys)}"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _text(size: float) -> str:
    unit, name = (1e12, "TB") if size >= 1e11 else (1e9, "GB") if size >= 1e8 else (1e6, "MB")
    return f"{size / unit:.2g} {name}" if size < 10 * unit else f"{size / unit:.0f} {name}"


def _or_smaller(dataset: LeRobotDataset, keys: Sequence[str]) -> str:
    """What shrinking would win, where it wins much."""
    _, height, width, _ = dataset.shape(keys[0])
    factor = min(height, width) // _USUAL
    if factor < 2:
        return ""
    low, narrow = height // factor, width // factor
    size = dataset.num_frames * len(keys) * low * narrow * 3
    return f"; {_text(size)} with --resize-shape {low} {narrow}"


class Feeder:
    """Camera frames of windows.

    Args:
        dataset: whose frames they are.
        keys: the cameras.
        feeding: how.
        device: where they are wanted; kept frames that take less than half of a GPU's free memory
            live there.
        check: called now and then while all frames are decoded; raises to stop.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        keys: Sequence[str],
        feeding: Feeding,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._dataset, self._keys, self._feeding = dataset, tuple(keys), feeding
        self._device, self._check = device, check

    def images(self, windows: Iterable[Indices]) -> Generator[Tensor]:
        """uint8 (B, N, K, H, W, 3) of frames int64 (B, N) each, in order.

        Raises:
            DatasetError: a frame is corrupt.
            DiskError: frames cannot be kept.
            VQBeTEdgeError: a process that decodes was killed.
        """
        if self._feeding.way == "stream":
            yield from map(self._to_device, self._streamed(windows))
            return
        cameras, resident = self._kept, self._resident
        for observed in windows:
            if resident is not None:
                yield torch.stack([camera[observed] for camera in resident], dim=2)
            else:
                # Rows as wide as frames: NumPy copies them ten times as fast as torch does.
                seen = [camera.take(observed, axis=0) for camera in cameras]
                yield self._to_device(torch.from_numpy(np.stack(seen, axis=2)))

    @cached_property
    def _kept(self) -> list[Frames]:
        return [self._dataset.frames(key, self._decode) for key in self._keys]

    @cached_property
    def _resident(self) -> list[Tensor] | None:
        if self._device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        if sum(camera.nbytes for camera in self._kept) > _SHARE * free:
            return None
        return [torch.tensor(camera, device=self._device) for camera in self._kept]

    def _to_device(self, images: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return images.to(self._device)
        return images.pin_memory().to(self._device, non_blocking=True)

    def _decode(self, blocks: Sequence[Block]) -> Iterator[Frames]:
        workers = self._feeding.workers if len(blocks) >= _FEW_BLOCKS else 0
        if not workers:
            decoded: Iterator[Frames] = map(self._dataset.decode, blocks)
        else:
            decoded = (part.numpy() for part in self._run(blocks, workers))
        for part in decoded:
            self._check()
            yield part

    def _streamed(self, windows: Iterable[Indices]) -> Iterator[Tensor]:
        """What a batch is made of is decoded while the batches before it are trained on."""
        own, ahead = tee(windows)
        work = (
            Windows(observed[first : first + _AT_ONCE])
            for observed in ahead
            for first in range(0, len(observed), _AT_ONCE)
        )
        with closing(self._run(work, self._feeding.workers)) as parts:
            for observed in own:
                yield torch.cat(list(islice(parts, -(-len(observed) // _AT_ONCE))))

    def _run(self, work: Iterable[Work], workers: int) -> Generator[Tensor]:
        loader: DataLoader[Tensor | VQBeTEdgeError] = DataLoader(
            _Decoding(self._dataset, self._keys),
            batch_size=None,
            sampler=work,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            # Beginning a process anew would import torch in each, which takes seconds.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # of its own: nothing is drawn from training's
        )
        with workers_named():
            # What a forked process inherits must not be collected there: closing a video waits for
            # its decoder's threads, which only this process has.
            gc.freeze()
            others = set(multiprocessing.active_children())
            try:
                running = iter(loader)
            finally:
                gc.unfreeze()
            begun = set(multiprocessing.active_children()) - others
            _WORKERS.update(child.pid for child in begun)
            try:
                for found in running:
                    if isinstance(found, VQBeTEdgeError):
                        raise found
                    yield found
            finally:
                del running  # ends its processes; a traceback would keep them


class _Decoding(Dataset[Any]):
    """Decodes in a process of its own; errors are handed over as they are."""

    def __init__(self, dataset: LeRobotDataset, keys: Sequence[str]) -> None:
        self._dataset, self._keys = dataset.for_windows(), keys

    def __getitem__(self, work: Work) -> Tensor | VQBeTEdgeError:
        try:
            match work:
                case Block():
                    found = torch.from_numpy(self._dataset.decode(work))
                case Windows(frames):
                    found = torch.stack([self._window(each) for each in frames])
        except VQBeTEdgeError as error:
            return error
        # Here and not on its way to the trainer, where want of shared memory goes unnoticed.
        if get_worker_info() is not None:
            found.share_memory_()  # type: ignore[no-untyped-call]
        return found

    def _window(self, frames: Indices) -> Tensor:
        seen = [torch.from_numpy(self._dataset.window(key, frames)) for key in self._keys]
        return torch.stack(seen, dim=1)


def _as_it_is(found: Any) -> Any:  # noqa: ANN401 - torch's
    return found


@atexit.register
def _end() -> None:
    """Before multiprocessing asks what nobody has ended by a signal that it does not listen to."""
    ours = [child for child in multiprocessing.active_children() if child.pid in _WORKERS]
    if ours:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would say that they have died
    for child in ours:
        child.kill()


def _begin(number: int) -> None:
    """Signals to the whole group are the trainer's, which ends its workers itself."""
    del number
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


@contextmanager
def workers_named() -> Iterator[None]:
    """Turn what torch says about workers that died, at any time, into a sentence.

    Raises:
        VQBeTEdgeError: one has died.
    """
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip().rpartition("\n")[2]
        raise VQBeTEdgeError(
            f"a process that decodes frames has failed ({reason}); with too little memory, or too "
            "little of it shared (docker run --shm-size), lower --num-workers. The last checkpoint "
            "is whole: go on with --resume"
        ) from error
