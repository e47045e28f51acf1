"""Files that this user alone may write, and the folder where they are kept.

Nothing that another user may have written is read, and links are not followed.
"""

import contextlib
import os
import re
import secrets
import stat
import time
from pathlib import Path

from vqbet_edge.errors import DiskError

CACHE_VARIABLE = "VQBET_EDGE_CACHE"
_TEMPORARY = re.compile(r"\..+\.(plan|json)\.[0-9a-f]{16}")
_OLD = 3600  # seconds
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_MAY_DO_ANYTHING = stat.S_IRWXG | stat.S_IRWXO


class RejectedError(Exception):
    """Why a stored file is not read."""


def user_cache() -> Path:
    """This user's cache directory: $VQBET_EDGE_CACHE, else `vqbet_edge` where caches go."""
    if os.environ.get(CACHE_VARIABLE):  # empty means unset, not the current directory
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vqbet_edge"


def private_user_cache() -> Path:
    """`user_cache()`, created where it is missing.

    Raises:
        DiskError: it cannot be created, or others may write there.
    """
    path = user_cache()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"cannot create the cache '{path}': {error.strerror}; "
            f"set {CACHE_VARIABLE} to a directory of yours"
        ) from error
    # Not `is_private`: a link of the user's own to another disk is as good as the folder.
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_MAY_WRITE:
        raise DiskError(
            f"the cache '{path}' belongs to, or can be written by, somebody else; run: "
            f"chmod go-w '{path}', or set {CACHE_VARIABLE} to a directory of yours alone"
        )
    return path


def is_private(folder: Path) -> bool:
    """Whether this is a directory of this user that only this user may write."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    private = status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE
    return stat.S_ISDIR(status.st_mode) and private


def read_private(path: Path, limit: int, *, secret: bool = False) -> bytes:
    """Contents of a regular file of this user that only this user may write.

    Args:
        path: the file; a link is not followed.
        limit: the most bytes that it may have.
        secret: nobody else may read it either.

    Raises:
        RejectedError: it is missing or another kind of file, owner, mode or size.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        # Closed by hand: `open` refuses a directory and leaves its descriptor open.
        try:
            _check(path.name, os.fstat(handle), limit, secret=secret)
            with open(handle, "rb", closefd=False) as file:
                return file.read(limit)
        finally:
            os.close(handle)
    except OSError as error:
        raise RejectedError(f"'{path.name}' cannot be read ({error.strerror})") from error


def _check(name: str, status: os.stat_result, limit: int, *, secret: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RejectedError(f"'{name}' is not a regular file")
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_MAY_WRITE:
        raise RejectedError(f"'{name}' belongs to, or can be written by, somebody else")
    if secret and status.st_mode & _OTHERS_MAY_DO_ANYTHING:
        raise RejectedError(f"'{name}' can be read by somebody else")
    if status.st_size > limit:
        raise RejectedError(f"'{name}' is larger than expected")


def _create(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:  # noqa: PTH123 - opened by descriptor
        file.write(data)
        file.flush()
        os.fsync(handle)


def create_secret(path: Path, size: int) -> None:
    """Create a file of `size` random bytes, unless there is one.

    It appears whole: neither dying midway nor reading meanwhile yields a short one.
    """
    temporary = _temporary(path)
    try:
        _create(temporary, secrets.token_bytes(size))
        with contextlib.suppress(FileExistsError):  # another process was faster: its secret stays
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user may read, whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    temporary = _temporary(path)
    try:
        _create(temporary, data)
        temporary.replace(path)
    except OSError as error:
        raise DiskError(f"cannot write '{path}' ({len(data)} bytes): {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote."""
    for path in folder.iterdir():
        # A younger one may be another process's that still writes it.
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _OLD:
                path.unlink()
