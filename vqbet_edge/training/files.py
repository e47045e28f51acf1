"""Writing so that a kill or a full disk never leaves half a file where a whole one is expected."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqbet_edge.errors import DiskError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a DiskError."""
    try:
        yield
    except OSError as e:
        raise DiskError(
            f"cannot write {path}: {e.strerror or e}. Free space or choose another folder, then "
            "go on from the last checkpoint with --resume"
        ) from e


def write_bytes(path: Path, data: bytes) -> None:
    """Write and flush to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name; it gets its own name when all is written."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to its sibling `target`, in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    with writing(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(link)
