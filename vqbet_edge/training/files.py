"""Writing so that a kill or a full disk leaves no half of a file; what to do about a broken one."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqbet_edge.errors import DiskError, UsageError

_SUFFIX = ".tmp"


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn what the operating system says about `path` into a DiskError."""
    try:
        yield
    except OSError as e:
        needed = "" if size is None else f" ({size} bytes)"
        raise DiskError(
            f"cannot write {path}{needed}: {e.strerror or e}. Free space or choose another "
            "folder, then go on from the last checkpoint with --resume"
        ) from e


def write_bytes(path: Path, data: bytes) -> None:
    """Write and flush to the disk; a DiskError says how many bytes are needed."""
    with writing(path, len(data)), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is the old or the new one."""
    temporary = _temporary(path)
    with writing(path):
        try:
            write_bytes(temporary, data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Delete what writers that were killed left in a directory."""
    for path in directory.glob(f".*{_SUFFIX}"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SUFFIX}")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name; it gets its own name when all is written."""
    temporary = _temporary(path)
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


def remove(directory: Path) -> None:
    """Delete a directory, so that a kill leaves it whole or swept."""
    temporary = _temporary(directory)
    with writing(directory):
        directory.replace(temporary)
        shutil.rmtree(temporary)


def point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to its sibling `target`, where the disk has links."""
    temporary = _temporary(link)
    with writing(link):
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # FAT has none
            temporary.symlink_to(target.name)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        if temporary.is_symlink():
            temporary.replace(link)
        else:
            link.unlink(missing_ok=True)


def numbered(checkpoints: Path) -> list[Path]:
    """The checkpoints in a folder of them, which are named by their steps; the newest last."""
    found = [path for path in checkpoints.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def through_last(path: Path) -> Path:
    """A path in a run; where copying has lost the link `last`, through the newest checkpoint."""
    if not path.exists():
        for place in (path, *path.parents):
            if place.name == "last" and (found := numbered(place.parent)):
                return found[-1] / path.relative_to(place)
    return path


def check_encodable(path: Path) -> None:
    """Refuse a path that the libraries below, which take UTF-8, cannot be told.

    Raises:
        UsageError: says what to set.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as e:
        raise UsageError(
            f"{str(path)!a} is no path that this program can hand on, because Python takes "
            f"file names to be {sys.getfilesystemencoding()} here; type first: export "
            "PYTHONUTF8=1"
        ) from e


def remedy(path: Path) -> str:
    """What to do about a file that is not what its name says."""
    with path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    if pointer:
        return f"it is a Git LFS pointer, not the file; in {path.parent} type: git lfs pull"
    return "copy or download it again"
