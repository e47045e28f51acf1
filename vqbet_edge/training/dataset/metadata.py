"""What a LeRobot data set says about itself: features, episodes, files.

Format v3.0 packs many episodes into one parquet and one video file and lists them in
`meta/episodes/`; format v2.1 has a file per episode and `meta/episodes.jsonl`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vqbet_edge.errors import DatasetError

SUPPORTED_VERSIONS = ("v3.0", "v2.1")


@dataclass(frozen=True)
class DatasetFeature:
    """One column of a data set.

    `shape` is without the time axis; an image's is (height, width, 3) whatever the file says.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_image(self) -> bool:
        """Whether the feature is a camera."""
        return self.dtype in {"image", "video"}


class Clip(NamedTuple):
    """Where one camera's frames of one episode lie."""

    path: Path
    start: float  # seconds from the beginning of the video file


@dataclass(frozen=True)
class EpisodeInfo:
    """One demonstration."""

    index: int
    length: int
    data_path: Path
    clips: Mapping[str, Clip]


@dataclass(frozen=True)
class DatasetInfo:
    """The whole of `meta/`."""

    root: Path
    fps: float
    features: Mapping[str, DatasetFeature]
    episodes: tuple[EpisodeInfo, ...]
    stats: Mapping[str, Mapping[str, Any]]

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Keys of the cameras."""
        return tuple(key for key, feature in self.features.items() if feature.is_image)

    @property
    def video_keys(self) -> tuple[str, ...]:
        """Keys of the cameras that are stored as video."""
        return tuple(key for key, feature in self.features.items() if feature.dtype == "video")


def read_info(root: Path) -> DatasetInfo:
    """Read and check `meta/`; every file that it names exists when this returns.

    Raises:
        DatasetError: a file is missing or unreadable, or the format version is unknown.
    """
    raw = _read_json(root / "meta" / "info.json")
    try:
        features = {key: _feature(value) for key, value in raw["features"].items()}
        episodes = tuple(_read_episodes(root, raw, features))
        fps = float(raw["fps"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, pa.ArrowException) as e:
        raise DatasetError(
            f"{root / 'meta'} is not complete ({type(e).__name__}: {e}); "
            "copy or download the data set again"
        ) from e
    if not episodes:
        raise DatasetError(f"{root} has no episodes; record at least one before training")
    stats_path = root / "meta" / "stats.json"
    stats = _read_json(stats_path) if stats_path.is_file() else {}
    info = DatasetInfo(root, fps, features, episodes, stats)
    _check_files(info)
    return info


def _feature(raw: Mapping[str, Any]) -> DatasetFeature:
    shape = tuple(int(side) for side in raw["shape"])
    dtype = str(raw["dtype"])
    if dtype in {"image", "video"} and shape[0] == 3 and shape[-1] != 3:
        shape = (*shape[1:], 3)
    return DatasetFeature(dtype, shape)


def _read_episodes(
    root: Path, raw: Mapping[str, Any], features: Mapping[str, DatasetFeature]
) -> Iterator[EpisodeInfo]:
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    match raw["codebase_version"]:
        case "v3.0":
            return _episodes_v30(root, raw, videos)
        case "v2.1":
            return _episodes_v21(root, raw, videos)
        case version:
            raise DatasetError(
                f"{root} has format {version}; expected one of {', '.join(SUPPORTED_VERSIONS)}. "
                "LeRobot's `lerobot.datasets` conversion scripts bring older data sets up to date"
            )


def _episodes_v30(root: Path, raw: Mapping[str, Any], videos: list[str]) -> Iterator[EpisodeInfo]:
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DatasetError(f"no file meta/episodes/*/*.parquet in {root}; copy the data set again")
    for path in paths:
        table = pq.ParquetFile(path)
        names = [name for name in table.schema_arrow.names if not name.startswith("stats/")]
        for row in table.read(columns=names).to_pylist():
            yield EpisodeInfo(
                index=row["episode_index"],
                length=row["length"],
                data_path=_inside(root, _numbered(raw["data_path"], row, "data")),
                clips={key: _clip_v30(root, raw, row, key) for key in videos},
            )


def _numbered(template: str, row: Mapping[str, Any], prefix: str, **names: str) -> str:
    chunk, file = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]
    return template.format(chunk_index=chunk, file_index=file, **names)


def _clip_v30(root: Path, raw: Mapping[str, Any], row: Mapping[str, Any], key: str) -> Clip:
    name = _numbered(raw["video_path"], row, f"videos/{key}", video_key=key)
    return Clip(_inside(root, name), float(row[f"videos/{key}/from_timestamp"]))


def _episodes_v21(root: Path, raw: Mapping[str, Any], videos: list[str]) -> Iterator[EpisodeInfo]:
    for line in _read_text(root / "meta" / "episodes.jsonl").splitlines():
        row = json.loads(line)
        index = int(row["episode_index"])
        place = {"episode_index": index, "episode_chunk": index // int(raw["chunks_size"])}
        yield EpisodeInfo(
            index=index,
            length=int(row["length"]),
            data_path=_inside(root, raw["data_path"].format(**place)),
            clips={
                key: Clip(_inside(root, raw["video_path"].format(video_key=key, **place)), 0.0)
                for key in videos
            },
        )


def _inside(root: Path, name: str) -> Path:
    """A data set comes from the net: its paths must not lead out of its folder."""
    path = root / name
    if not path.absolute().is_relative_to(root.absolute()) or ".." in path.parts:
        raise DatasetError(f"{root / 'meta/info.json'} names '{name}', which leaves the data set")
    return path


def _check_files(info: DatasetInfo) -> None:
    checked: set[Path] = set()
    for episode in info.episodes:
        for path in (episode.data_path, *(clip.path for clip in episode.clips.values())):
            if path not in checked and not path.is_file():
                raise DatasetError(
                    f"{path} is missing; episode {episode.index} needs it. "
                    "Copy or download the data set again"
                )
            checked.add(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as e:
        raise DatasetError(f"{path} is not JSON: {e}; copy the data set again") from e
    if not isinstance(value, dict):
        raise DatasetError(f"{path} holds no JSON object; copy the data set again")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DatasetError(
            f"cannot read {path}: {e}. A LeRobot data set is a folder with meta/info.json in it"
        ) from e
