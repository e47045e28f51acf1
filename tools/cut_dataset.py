"""Copy the first episodes of a LeRobot data set (format v3.0, one file of each kind) to a folder.

Video packets are copied, not encoded again, so frames stay as they were.

    python tools/cut_dataset.py SOURCE TARGET --episodes 4
"""

import argparse
import json
import shutil
from pathlib import Path

import av
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqbet_edge.training.dataset import LeRobotDataset


def main() -> None:
    """Parse the command line and cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--episodes", type=int, default=4)
    arguments = parser.parse_args()
    cut(arguments.source, arguments.target, arguments.episodes)


def cut(source: Path, target: Path, episodes: int) -> None:
    """Write the first `episodes` episodes of `source` to `target`."""
    for path in sorted(source.glob("data/*/*.parquet")) + sorted(
        source.glob("meta/episodes/*/*.parquet")
    ):
        _cut_table(path, target / path.relative_to(source), episodes)
    info = json.loads((source / "meta/info.json").read_text())
    for path in sorted(source.glob("videos/*/*/*.mp4")):
        _cut_video(path, target / path.relative_to(source), _end(target, path.parts[-3]))
    frames = pq.read_metadata(next(target.glob("data/*/*.parquet"))).num_rows
    info |= {"total_episodes": episodes, "total_frames": frames}
    info["splits"] = {"train": f"0:{episodes}"}
    (target / "meta/info.json").write_text(json.dumps(info, indent=4))
    shutil.copy(source / "meta/tasks.parquet", target / "meta/tasks.parquet")
    _write_stats(target, json.loads((source / "meta/stats.json").read_text()))


def _cut_table(path: Path, target: Path, episodes: int) -> None:
    table = pq.read_table(path).filter(pc.field("episode_index") < episodes)
    keep = [name for name in table.column_names if not name.startswith("stats/")]
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.select(keep), target)


def _end(target: Path, key: str) -> float:
    """Seconds at which the last kept episode ends."""
    table = pq.read_table(next(target.glob("meta/episodes/*/*.parquet")))
    return max(table[f"videos/{key}/to_timestamp"].to_pylist())


def _cut_video(path: Path, target: Path, end: float) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path)) as source, av.open(str(target), "w") as copy:
        stream = source.streams.video[0]
        output = copy.add_stream_from_template(stream, opaque=True)
        for packet in source.demux(stream):
            if packet.pts is not None and packet.pts * float(stream.time_base) < end - 1e-3:
                packet.stream = output
                copy.mux(packet)


def _write_stats(target: Path, old: dict) -> None:
    """Statistics of what is left; those of the cameras stay, the policy does not use them."""
    (target / "meta/stats.json").write_text("{}")
    dataset = LeRobotDataset.open(target)
    stats = {key: old[key] for key in dataset.image_keys}
    for key, feature in dataset.features.items():
        if key not in stats and feature.dtype.startswith("float"):
            values = dataset.statistics(key)
            stats[key] = {name: value.tolist() for name, value in values.items()}
            stats[key]["count"] = [dataset.num_frames]
    (target / "meta/stats.json").write_text(json.dumps(stats, indent=4))


if __name__ == "__main__":
    main()
