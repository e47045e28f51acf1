"""Engines built on this machine, and why one may not be loaded.

An engine is code: deserialising one runs what is inside. So an engine is taken only when this user
built it on this machine, for exactly this graph, TensorRT, GPU and driver; everything is checked
before TensorRT sees a byte. docs/security.md states the stance.

    engines/<device>/<stage>-<graph>.plan     the engine
    engines/<device>/<stage>-<graph>.json     its record: key, digest, size, seal; written last
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from vqbet_edge.backends.tensorrt_module import Flavour
from vqbet_edge.errors import DiskError
from vqbet_edge.manifest import StageName

CACHE_VARIABLE = "VQBET_EDGE_CACHE"
_SEAL_NAME = "engine-seal.key"
_SEAL_BYTES = 32
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_MAY_DO_ANYTHING = stat.S_IRWXG | stat.S_IRWXO
_MAX_RECORD_BYTES = 1 << 16
_MAX_PLAN_BYTES = 1 << 33


class BuildOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """How an engine is built.

    Attributes:
        workspace_mb: scratch memory that the builder may use, in MiB; None leaves it to TensorRT.
        optimization_level: 0 (fast build) to 5 (fast engine).
    """

    workspace_mb: int | None = None
    optimization_level: int = 3


class EngineKey(Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine was built from and for; two engines with one key are interchangeable.

    Attributes:
        stage: the bundle's stage.
        graph_sha256: of the ONNX file.
        flavour: `tensorrt` or `tensorrt_rtx`.
        tensorrt: its version.
        gpu: the GPU's name.
        compute_capability: such as "8.7".
        driver: CUDA driver and kernel module.
        options: how it is built; None matches every way.
    """

    stage: StageName
    graph_sha256: str
    flavour: Flavour
    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str
    options: BuildOptions | None

    @property
    def device(self) -> str:
        """Folder name for engines of this TensorRT on this GPU."""
        text = f"{self.flavour}-{self.tensorrt}-{self.gpu}-sm{self.compute_capability}"
        return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")

    @property
    def file_stem(self) -> str:
        """File name without extension."""
        return f"{self.stage}-{self.graph_sha256[:16]}"


class EngineRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What stands beside a plan.

    Attributes:
        key: what it was built from and for, `options` included.
        plan_sha256: of the plan.
        size: of the plan, bytes.
        build_seconds: parsing and building.
        seal: HMAC-SHA-256 of the record without it, under this user's key of this machine.
    """

    key: EngineKey
    plan_sha256: str
    size: int
    build_seconds: float
    seal: str = ""


@dataclass(frozen=True)
class Lookup:
    """The plan and its path, or None and the reason in one line."""

    plan: bytes | None
    path: Path | None
    reason: str


class RejectedError(Exception):
    """Why a stored file is not read."""


class EngineCache:
    """The engines of one bundle: in the bundle where it can be written, else the user's cache."""

    def __init__(self, bundle: Path) -> None:
        self._bundle, self._user = bundle, user_cache()

    def find(self, key: EngineKey) -> Lookup:
        """Look an engine up without trusting it; never raises for what is wrong with an engine.

        Raises:
            DiskError: the key that seals engines, or its folder, is not this user's alone.
        """
        reason = "no engine has been built for this device yet"
        for root in (self._bundle, self._user):
            folder = root / "engines" / key.device
            if not os.path.lexists(folder / f"{key.file_stem}.json"):
                continue
            try:
                plan = _load(folder, key, self._seal_key())
                return Lookup(plan, folder / f"{key.file_stem}.plan", "")
            except RejectedError as error:
                reason = str(error)
        return Lookup(None, None, reason)

    def store(self, key: EngineKey, plan: bytes, build_seconds: float) -> Path:
        """Keep an engine that was just built here.

        Returns:
            The plan's path.

        Raises:
            DiskError: neither the bundle nor the user's cache can be written.
        """
        digest = hashlib.sha256(plan).hexdigest()
        record = EngineRecord(key, digest, len(plan), build_seconds)
        record = msgspec.structs.replace(record, seal=_seal(record, self._seal_key()))
        text = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
        folder = self._folder(key)
        write_private(folder / f"{key.file_stem}.plan", plan)
        # The record names the plan's digest, so dying between the two leaves a pair that is
        # detected, never one that is believed.
        write_private(folder / f"{key.file_stem}.json", text)
        return folder / f"{key.file_stem}.plan"

    def _folder(self, key: EngineKey) -> Path:
        roots = [self._user]
        if _is_private(self._bundle) and os.access(self._bundle, os.W_OK):
            roots.insert(0, self._bundle)
        error: OSError | None = None
        for root in roots:
            folder = root / "engines" / key.device
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as failure:
                error = failure
                continue
            if _is_private(folder):
                return folder
        raise DiskError(
            f"engines can be kept neither in '{self._bundle}' nor in '{self._user}' "
            f"({error or 'others may write there'}); set {CACHE_VARIABLE} to a directory of yours"
        )

    def _seal_key(self) -> bytes:
        """This user's secret of this machine; made on first use."""
        path = private_user_cache() / _SEAL_NAME
        try:
            if not os.path.lexists(path):
                _create_key(path)
            key = read_private(path, _SEAL_BYTES, secret=True)
        except OSError as error:
            raise DiskError(
                f"cannot keep engines in '{self._user}': {error.strerror}; "
                f"set {CACHE_VARIABLE} to a directory of yours"
            ) from error
        except RejectedError as error:
            raise DiskError(
                f"the key that seals engines is not usable: {error}; delete '{path}' "
                "and build the engines again with vqbet-build"
            ) from error
        if len(key) != _SEAL_BYTES:
            # A short key is one that anybody can guess, who then can seal engines.
            raise DiskError(
                f"expected {_SEAL_BYTES} bytes in '{path}', got {len(key)}; "
                "delete it and build the engines again with vqbet-build"
            )
        return key


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
    # Not `_is_private`: a link of the user's own to another disk is as good as the folder.
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_MAY_WRITE:
        raise DiskError(
            f"the cache '{path}' belongs to, or can be written by, somebody else; run: "
            f"chmod go-w '{path}', or set {CACHE_VARIABLE} to a directory of yours alone"
        )
    return path


def _load(folder: Path, key: EngineKey, seal_key: bytes) -> bytes:
    """The plan, after every check.

    Raises:
        RejectedError: with the reason.
    """
    if not _is_private(folder):
        raise RejectedError(f"'{folder}' belongs to, or can be written by, somebody else")
    try:
        record = msgspec.json.decode(
            read_private(folder / f"{key.file_stem}.json", _MAX_RECORD_BYTES), type=EngineRecord
        )
    except (msgspec.DecodeError, RecursionError) as error:
        raise RejectedError(f"the engine's record is damaged ({error})") from error
    if not hmac.compare_digest(_seal(record, seal_key).encode(), record.seal.encode()):
        raise RejectedError("the engine was not built by this user on this machine")
    _check_key(record.key, key)
    plan = read_private(folder / f"{key.file_stem}.plan", min(record.size, _MAX_PLAN_BYTES))
    if hashlib.sha256(plan).hexdigest() != record.plan_sha256:
        raise RejectedError("the engine is truncated or altered")
    return plan


def _check_key(built: EngineKey, wanted: EngineKey) -> None:
    for name in wanted.__struct_fields__:
        have, need = getattr(built, name), getattr(wanted, name)
        if have != need and not (name == "options" and need is None):
            raise RejectedError(f"it was built for {name} {have}, needed is {need}")


def _seal(record: EngineRecord, seal_key: bytes) -> str:
    body = msgspec.json.encode(msgspec.structs.replace(record, seal=""))
    return hmac.new(seal_key, body, hashlib.sha256).hexdigest()


def _is_private(folder: Path) -> bool:
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
    except OSError as error:
        raise RejectedError(f"'{path.name}' cannot be read ({error.strerror})") from error
    with open(handle, "rb") as file:  # noqa: PTH123 - opened by descriptor
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedError(f"'{path.name}' is not a regular file")
        if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_MAY_WRITE:
            raise RejectedError(f"'{path.name}' belongs to, or can be written by, somebody else")
        if secret and status.st_mode & _OTHERS_MAY_DO_ANYTHING:
            raise RejectedError(f"'{path.name}' can be read by somebody else")
        if status.st_size > limit:
            raise RejectedError(f"'{path.name}' is larger than expected")
        return file.read(limit)


def _create(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:  # noqa: PTH123 - opened by descriptor
        file.write(data)
        file.flush()
        os.fsync(handle)


def _create_key(path: Path) -> None:
    """Make the key appear whole: dying midway, or reading meanwhile, must not yield a short one."""
    temporary = _temporary(path)
    try:
        _create(temporary, secrets.token_bytes(_SEAL_BYTES))
        with contextlib.suppress(FileExistsError):  # another process was faster: its key stays
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
