"""Writing a bundle so that a kill at any moment leaves the old one or the new one."""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from vqbet_edge.errors import DiskError, UsageError
from vqbet_edge.runtime.manifest import MANIFEST_NAME, FileSpec, Manifest, encode_manifest

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def publish(target: Path, contents: Mapping[str, bytes], manifest: Manifest) -> None:
    """Write a complete bundle, replacing what is there.

    The manifest gets the contents' digests. The files are written next to the target and moved
    there in one step. What a killed run left behind is removed by the next run.

    Raises:
        UsageError: another export is writing the same bundle.
        DiskError: no space, no permission or a read-only disk; the previous bundle is intact.
    """
    needed = sum(map(len, contents.values()))
    manifest = msgspec.structs.replace(manifest, files=file_specs(contents))
    # A link to a bundle stands for it: the link itself must not be exchanged.
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _private_directory(target.with_name(f".{target.name}.partial")) as partial:
            try:
                for name, data in {**contents, MANIFEST_NAME: encode_manifest(manifest)}.items():
                    _write(partial / name, data)
                _sync_directory(partial)
                _move(partial, target)
                _sync_directory(target.parent)
            finally:
                # After an exchange this is the previous bundle.
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DiskError(
            f"cannot write '{target}' ({needed} bytes): {error.strerror}; what was there before is "
            "intact; free space or choose another place with -o"
        ) from error


def file_specs(contents: Mapping[str, bytes]) -> dict[str, FileSpec]:
    """Digest and size of every file, as the manifest lists them."""
    return {
        name: FileSpec(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for name, data in sorted(contents.items())
    }


@contextmanager
def _private_directory(path: Path) -> Iterator[Path]:
    """An empty directory that no other process writes to until the block ends."""
    path.mkdir(exist_ok=True)
    # Not followed: what a link points to is somebody else's and would be emptied.
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, another process may have moved it into place.
            mine = path.exists() and path.stat().st_ino == os.fstat(handle).st_ino
        except BlockingIOError:
            mine = False
        if not mine:
            raise UsageError(f"another export is writing '{path}'; wait for it to end")
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield path
    finally:
        os.close(handle)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`, which afterwards is where `source` was."""
    if not target.exists():
        source.rename(target)
        return
    # Only an exchange replaces a full directory in one step; Python has no call for it.
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(source), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS}:
        raise DiskError(
            f"the file system of '{target}' cannot replace a directory in one step; "
            "remove the old bundle first, or choose another place with -o"
        )
    raise OSError(code, os.strerror(code), str(target))
