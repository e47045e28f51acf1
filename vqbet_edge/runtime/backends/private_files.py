"""Files that only root or this user can have written, and the cache where they are kept.

What root and this user write is as trusted as the programs that they install, so a file needs no
seal where nobody else may write to it or to any folder above it.
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
# Others may read, so that what root built can be loaded by any user; the umask may forbid it.
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644
_ROOT = 0
_TEMPORARY = re.compile(r"\..+\.(plan|json|cache)\.[0-9a-f]{16}")
_OLD = 3600  # seconds
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class RejectedError(Exception):
    """Why a stored file is not read."""


def user_cache() -> Path:
    """The cache directory: $VQBET_EDGE_CACHE, else `vqbet_edge` where this user's caches go.

    Raises:
        DiskError: this user has no home, as in a container under a number without a name.
    """
    if os.environ.get(CACHE_VARIABLE):  # empty means unset, not the current directory
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "vqbet_edge"
    except RuntimeError as error:
        raise DiskError(
            f"user {os.geteuid()} has no home directory for engines; "
            f"set {CACHE_VARIABLE} to a directory of its own"
        ) from error


def private_user_cache(folder: str = "") -> Path:
    """`user_cache()` or a folder in it, created where it is missing, to be written to.

    Raises:
        DiskError: it cannot be created or written, or others may write there.
    """
    path = user_cache() / folder
    try:
        for each in (user_cache(), path):  # nothing is created where others may write
            for missing in reversed([p for p in (each, *each.parents) if not p.exists()]):
                # Not `parents=True`: a umask of 002, Ubuntu's, would let the group write to them.
                missing.mkdir(_FOLDER_MODE, exist_ok=True)
            check_folder(each)
        reason = "" if os.access(path, os.W_OK) else "this user may not write there"
    except OSError as error:
        reason = f"cannot create it: {error.strerror}"
    except RejectedError as error:
        reason = str(error)
    if reason:
        raise DiskError(
            f"nothing can be kept in the cache '{path}': {reason}; "
            f"or set {CACHE_VARIABLE} to a directory of yours"
        )
    return path


def check_folder(folder: Path) -> None:
    """Refuse, with a RejectedError, a folder if others may write there or to one above it."""
    try:
        real = folder.resolve(strict=True)  # a link is as good as where it leads
        check_owner(real, real.stat())
        for above in real.parents:
            check_owner(above, above.stat(), above=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, until Python 3.13
        raise RejectedError(f"'{folder}' cannot be read ({error})") from error


def check_owner(path: Path, status: os.stat_result, *, above: bool = False) -> None:
    """Refuse, with a RejectedError, a file or folder that others own or may write.

    In a folder `above` the one in question, like /tmp, others may write if they may not rename
    what is not theirs.
    """
    trusted = {_ROOT, os.geteuid()}
    if status.st_uid not in trusted:
        expected = " or ".join(map(str, sorted(trusted)))
        raise RejectedError(f"'{path}' belongs to user {status.st_uid}, expected user {expected}")
    sticky = above and status.st_mode & stat.S_ISVTX
    if status.st_mode & _OTHERS_MAY_WRITE and not sticky:
        raise RejectedError(
            f"'{path}' can be written by somebody else (mode {stat.S_IMODE(status.st_mode):o}); "
            f"run: chmod go-w '{path}'"
        )


def read_private(path: Path, limit: int) -> bytes:
    """Contents of a regular file of at most `limit` bytes that only root or this user may write.

    It stands in a folder that `check_folder` accepts; a link is not followed.

    Raises:
        RejectedError: it is missing or another kind of file, owner, mode or size.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        # Closed by hand: `open` refuses a directory and leaves its descriptor open.
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise RejectedError(f"'{path}' is not a regular file")
            check_owner(path, status)
            if status.st_size > limit:
                raise RejectedError(f"'{path}' is larger than expected")
            with open(handle, "rb", closefd=False) as file:
                return file.read(limit)
        finally:
            os.close(handle)
    except OSError as error:
        raise RejectedError(f"'{path}' cannot be read ({error.strerror})") from error


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user may write, whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, _FILE_MODE), "wb") as file:  # noqa: PTH123 - descriptor
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DiskError(f"cannot write '{path}' ({len(data)} bytes): {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote."""
    for path in folder.iterdir():
        # A younger one may be another process's that still writes it.
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _OLD:
                path.unlink()
