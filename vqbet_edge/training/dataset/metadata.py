"""What a LeRobot data set says about itself in `meta/`: features, episodes, statistics.

Format v3.0 packs many episodes into one parquet and one video file and lists them in
`meta/episodes/`; format v2.1 has a file per episode and `meta/episodes.jsonl`. What nobody asks
for is not read, and what is not understood is left out.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vqbet_edge.errors import DatasetError

# No camera, arm or data set comes near; beyond it a number is a mistake.
_MOST = 1e9
# LeRobot's templates, where info.json has none.
_VIDEO_PATHS = {
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
# Their names and widths; Python's own templates reach attributes, and any amount of memory.
_TEMPLATE = re.compile(r"([^{}]|\{[a-z_]+(:0\dd)?\})*")
_DEPTH_MARKS = ("is_depth_map", "video.is_depth_map")
# What a file that says something else than expected comes to; Infinity is no integer.
_MISUSED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
Json = dict[str, Any]
# By name: min, max, mean, std, q01, q10, q50, q90, q99; each (dim,), of images per channel.
Stats = dict[str, npt.NDArray[np.float32]]
BASIC = ("min", "max", "mean", "std")
_Wide = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class DatasetFeature:
    """One column of a data set."""

    dtype: str  # as info.json names it
    shape: tuple[int, ...]  # of a step; (height, width, channels) whatever the file says
    is_depth: bool = False
    names: tuple[str, ...] = ()  # of a vector's numbers; empty where there is not one for each

    @property
    def is_image(self) -> bool:
        """Whether the feature is a camera."""
        return self.dtype in {"image", "video"}

    @property
    def is_rgb(self) -> bool:
        """Whether it is a camera that a policy can look through."""
        rgb = len(self.shape) == 3 and self.shape[2] == 3
        return self.is_image and rgb and not self.is_depth

    @property
    def is_vector(self) -> bool:
        """Whether it is a number or a vector of numbers."""
        return len(self.shape) == 1 and not self.is_image and self.dtype != "string"

    def __str__(self) -> str:
        kind = "a depth map" if self.is_depth else self.dtype
        return f"{kind} of {'x'.join(map(str, self.shape))}"


class Clip(NamedTuple):
    """Where one camera's frames of one episode lie."""

    path: Path
    start: float  # seconds from the beginning of the video file


@dataclass(frozen=True)
class EpisodeInfo:
    """One demonstration."""

    index: int  # its number in the data
    length: int  # frames that `meta/` promises
    place: Mapping[str, Any]  # what `meta/` says about its files


@dataclass(frozen=True)
class DatasetInfo:
    """The part of `meta/` that is read at once."""

    root: Path
    version: int  # 3 or 2, the format's
    fps: float
    features: Mapping[str, DatasetFeature]  # those that are not understood are left out
    episodes: tuple[EpisodeInfo, ...]  # in the order of their indices
    video_path: str  # template of the videos' names
    left_out: tuple[int, ...] = ()  # numbers of episodes that were not chosen

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of all cameras, depth maps included."""
        return tuple(key for key, feature in self.features.items() if feature.is_image)

    @cached_property
    def _episodes(self) -> Path:
        return self.root / "meta" / "episodes"

    def clip(self, episode: EpisodeInfo, key: str) -> Clip:
        """Where the video of a camera is.

        Raises:
            DatasetError: `meta/` does not say it, or the file is missing.
        """
        place, where, start = episode.place, self._episodes, 0.0
        names: dict[str, Any] = {"video_key": key}
        try:
            if self.version == 3:
                for part in ("chunk_index", "file_index"):
                    name = f"videos/{key}/{part}"
                    names[part] = _whole(where, name, place[name])
                name = f"videos/{key}/from_timestamp"
                start = _number(where, name, place[name])
            pure = PurePosixPath(self.video_path.format(**names, **place))
            # A data set comes from the net: what it names must not lead out of its folder.
            if pure.is_absolute() or ".." in pure.parts:
                raise DatasetError(
                    f"{self.root / 'meta/info.json'} names '{pure}', which leaves the data set"
                )
            path = self.root / pure
        except (*_MISUSED, IndexError) as e:
            raise DatasetError(
                f"{self.root / 'meta'} does not say where the frames of '{key}' of episode "
                f"{episode.index} are ({type(e).__name__}: {e}); copy the data set again, or "
                "choose other cameras with --cameras"
            ) from e
        if not path.is_file():
            raise DatasetError(
                f"{path} is missing; episode {episode.index} needs it for '{key}'. Copy or "
                "download the data set again, or choose other cameras with --cameras"
            )
        return Clip(path, start)


def read_info(root: Path) -> DatasetInfo:
    """Read `meta/`.

    Raises:
        DatasetError: a file is missing or unreadable, or the format version is unknown.
    """
    path = root / "meta" / "info.json"
    raw = _read_json(path)
    # As LeRobot does, a newer minor version is read and a newer major one is not.
    match = re.fullmatch(r"v?(\d+)\.\d+(\.\d+)?", str(raw.get("codebase_version")))
    version = int(match[1]) if match else 0
    if version not in _VIDEO_PATHS:
        raise DatasetError(
            f"{path} has format {raw.get('codebase_version')}; expected one of v3.0, v2.1. "
            "LeRobot's `lerobot.datasets` conversion scripts bring older data sets up to date"
        )
    features = {}
    try:
        for key, spec in raw["features"].items():
            with suppress(*_MISUSED):
                features[key] = _feature(spec)
        fps = _number(path, "fps", raw["fps"])
        if fps <= 0:
            raise _no_number(path, "fps", raw["fps"], "more than 0")
        rows = _rows_v3(root) if version == 3 else _rows_v2(root, raw)
        episodes = sorted((_episode(root, row) for row in rows), key=lambda episode: episode.index)
    except (*_MISUSED, pa.ArrowException, OSError) as e:
        raise DatasetError(
            f"{root / 'meta'} is not complete ({type(e).__name__}: {e}); "
            "copy or download the data set again"
        ) from e
    if not episodes:
        raise DatasetError(f"{root} has no episodes; record at least one before training")
    indices = [episode.index for episode in episodes]
    if len(set(indices)) < len(indices):
        twice = next(i for i in indices if indices.count(i) > 1)
        raise DatasetError(
            f"{root / 'meta'} lists episode {twice} twice; number the episodes anew, for instance "
            "with LeRobot's lerobot-edit-dataset"
        )
    template = str(raw.get("video_path") or _VIDEO_PATHS[version])
    if _TEMPLATE.fullmatch(template) is None:
        raise DatasetError(
            f"{path} has the video_path '{template}', expected one such as {_VIDEO_PATHS[version]}"
        )
    return DatasetInfo(root, version, fps, features, tuple(episodes), template)


def choose_episodes(info: DatasetInfo, wanted: Sequence[int | str]) -> DatasetInfo:
    """The same of some episodes: numbers, and ranges without their end such as "0:50".

    Raises:
        DatasetError: there is no such episode.
    """
    known = [episode.index for episode in info.episodes]
    numbers: set[int] = set()
    for each in wanted:
        match = re.fullmatch(r"(\d+)(?::(\d+))?", str(each))
        first = int(match[1]) if match else 0
        last = int(match[2]) - 1 if match and match[2] else first
        if match is None or last < first:
            raise DatasetError(
                f"--episodes takes numbers, and ranges without their end such as 0:50, got {each!r}"
            )
        if not {first, last} <= set(known):
            raise DatasetError(
                f"{info.root} has no episode {first if first not in known else last}; they are "
                f"numbered {known[0]} to {known[-1]}"
            )
        numbers.update(index for index in known if first <= index <= last)
    chosen = tuple(episode for episode in info.episodes if episode.index in numbers)
    if not chosen:
        raise DatasetError("--episodes names none; leave it out to take all")
    left_out = tuple(index for index in known if index not in numbers)
    return replace(info, episodes=chosen, left_out=left_out)


def _feature(raw: Mapping[str, Any]) -> DatasetFeature:
    shape = tuple(_side(side) for side in raw["shape"])
    dtype = str(raw["dtype"])
    names = raw.get("names")
    if dtype not in {"image", "video"}:
        return DatasetFeature(dtype, shape, names=_vector_names(names, shape))
    first = isinstance(names, list) and bool(names) and str(names[0]).startswith("channel")
    if len(shape) == 3 and (first or (shape[0] == 3 and shape[-1] != 3)):
        shape = (*shape[1:], shape[0])
    marks = {**(raw.get("video_info") or {}), **(raw.get("info") or {})}
    return DatasetFeature(dtype, shape, any(marks.get(mark) for mark in _DEPTH_MARKS))


def _side(value: Any) -> int:  # noqa: ANN401 - a file's
    """One side of a shape, which an array could have."""
    if isinstance(value, bool) or not 0 < value <= _MOST or value != int(value):
        raise ValueError(f"a side of {value!r}")
    return int(value)


def _vector_names(names: Any, shape: tuple[int, ...]) -> tuple[str, ...]:  # noqa: ANN401 - a file's
    """LeRobot writes a list, before 2025 in a mapping of one kind: {"motors": [...]}."""
    if isinstance(names, dict) and len(names) == 1:
        (names,) = names.values()
    fits = isinstance(names, list) and len(shape) == 1 and len(names) == shape[0]
    return tuple(map(str, names)) if fits else ()


def _episode(root: Path, row: Mapping[str, Any]) -> EpisodeInfo:
    where = root / "meta" / "episodes"
    index, length = (_whole(where, name, row[name]) for name in ("episode_index", "length"))
    return EpisodeInfo(index, length, row)


def _number(path: Path, name: str, value: Any) -> float:  # noqa: ANN401 - a file's
    """A number that is finite, not negative and no mistake; else DatasetError says where it is."""
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and 0 <= float(value) <= _MOST:
            return float(value)
    raise _no_number(path, name, value, f"in [0, {_MOST:g}]")


def _whole(path: Path, name: str, value: Any) -> int:  # noqa: ANN401 - a file's
    number = _number(path, name, value)
    if number != int(number):
        raise _no_number(path, name, value, "whole")
    return int(number)


def _no_number(path: Path, name: str, value: object, what: str) -> DatasetError:
    return DatasetError(
        f"{path}: expected a number for '{name}' that is {what}, got {value!r}; correct it, or "
        "copy the data set again"
    )


def _rows_v3(root: Path) -> Iterator[Json]:
    paths = _episode_files(root)
    if not paths:
        raise DatasetError(f"no file meta/episodes/*/*.parquet in {root}; copy the data set again")
    for path in paths:
        table = pq.ParquetFile(path)
        own = {"episode_index", "length"}
        names = table.schema_arrow.names
        wanted = [name for name in names if name in own or name.startswith("videos/")]
        yield from table.read(columns=wanted).to_pylist()


def _rows_v2(root: Path, raw: Json) -> Iterator[Json]:
    path = root / "meta" / "episodes.jsonl"
    info, name = path.with_name("info.json"), "chunks_size"
    size = 1000 if raw.get(name) is None else _whole(info, name, raw[name])
    if size < 1:
        raise _no_number(info, name, size, "at least 1")
    for row in _read_lines(path):
        index = _whole(path, "episode_index", row["episode_index"])
        yield {"episode_index": index, "episode_chunk": index // size, "length": row["length"]}


def _episode_files(root: Path) -> list[Path]:
    return sorted((root / "meta" / "episodes").glob("*/*.parquet"))


def stored_statistics(info: DatasetInfo, key: str, names: Sequence[str]) -> Stats | None:
    """Those of the data set in `meta/`, else of its episodes; None where they are not complete."""
    width = info.features[key].shape[-1]
    path = info.root / "meta" / "stats.json"
    whole = _read_json(path).get(key) if path.is_file() else None
    found = _usable(whole, names, width)
    if found is None:
        wanted = {*names, "mean", "count"}
        parts = [_usable(part, sorted(wanted), width) for part in _per_episode(info, key)]
        complete = [part for part in parts if part is not None]
        if not complete or len(complete) < len(parts):
            return None
        found = aggregate(complete, names)
    with np.errstate(over="ignore"):
        narrow = {name: found[name].astype(np.float32) for name in names}
    return narrow if all(np.isfinite(value).all() for value in narrow.values()) else None


def _usable(raw: Any, names: Sequence[str], width: int) -> _Wide | None:  # noqa: ANN401 - a file's
    """The named statistics, (width,) each, or None if one is missing or not a finite number."""
    with suppress(*_MISUSED):
        found = {name: np.asarray(raw[name], np.float64).reshape(-1) for name in names}
        sizes = {len(value) for name, value in found.items() if name != "count"}
        finite = all(np.isfinite(value).all() for value in found.values())
        if sizes == {width} and finite and ("std" not in names or _plausible(raw)):
            return found
    return None


def _plausible(raw: Mapping[str, Any]) -> bool:
    """Whether a deviation can belong to its quantiles, a tenth of the values being beyond each.

    LeRobot 0.4's writer squares pixels as uint8, and its deviations come out near zero.
    """
    if "q10" not in raw or "q90" not in raw:
        return True
    std, mean, low, high = (np.asarray(raw[n], np.float64) for n in ("std", "mean", "q10", "q90"))
    least = np.sqrt(0.1 * ((mean - low) ** 2 + (high - mean) ** 2))
    # Half of it, because the quantiles of many episodes are averages.
    return bool((std >= least / 2).all())


def _per_episode(info: DatasetInfo, key: str) -> Iterator[Any]:
    if info.version == 2:
        path = info.root / "meta" / "episodes_stats.jsonl"
        for row in _read_lines(path) if path.is_file() else ():
            yield (row.get("stats") or {}).get(key)
        return
    prefix = f"stats/{key}/"
    for path in _episode_files(info.root):
        table = pq.ParquetFile(path)
        wanted = [name for name in table.schema_arrow.names if name.startswith(prefix)]
        for row in table.read(columns=wanted).to_pylist():
            yield {name.removeprefix(prefix): value for name, value in row.items()}


def aggregate(parts: Sequence[_Wide], names: Sequence[str]) -> _Wide:
    """Statistics of all episodes from each one's, weighted by their frames.

    Quantiles are averaged too, as LeRobot's `aggregate_feature_stats` does it.
    """
    stacked = {name: np.stack([part[name] for part in parts]) for name in {*names, "mean", "count"}}
    with np.errstate(invalid="ignore"):  # of no frames
        share = stacked["count"][:, :1] / stacked["count"][:, :1].sum()
    mean = (stacked["mean"] * share).sum(axis=0)
    found: _Wide = {}
    for name in names:
        values = stacked[name]
        match name:
            case "min" | "max":
                found[name] = getattr(values, name)(axis=0)
            case "std":
                spread = values**2 + (stacked["mean"] - mean) ** 2
                found[name] = np.sqrt((spread * share).sum(axis=0))
            case _:
                found[name] = (values * share).sum(axis=0)
    return found


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as e:
        raise DatasetError(f"{path} is not JSON: {e}; copy the data set again") from e
    if not isinstance(value, dict):
        raise DatasetError(f"{path} holds no JSON object; copy the data set again")
    return value


def _read_lines(path: Path) -> list[Json]:
    try:
        return [json.loads(line) for line in _read_text(path).splitlines() if line.strip()]
    except (ValueError, RecursionError) as e:
        raise DatasetError(f"{path} is not JSON: {e}; copy the data set again") from e


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DatasetError(
            f"cannot read {path}: {e}. A LeRobot data set is a folder with meta/info.json in it"
        ) from e
