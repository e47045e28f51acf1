"""Engines built for this machine, and why one may not be loaded.

An engine is code: deserialising one runs what is inside. So an engine is taken only from a folder
that nobody but root and this user may write to, and only for exactly this graph, TensorRT, GPU and
driver; everything is checked before TensorRT sees a byte. SECURITY.md states the stance.

    engines/<device>/<stage>-<graph>.plan     the engine
    engines/<device>/<stage>-<graph>.json     its record: key, digest and size; written last
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from vqbet_edge.runtime.backends.private_files import (
    RejectedError,
    check_folder,
    private_user_cache,
    read_private,
    sweep,
    user_cache,
    write_private,
)
from vqbet_edge.runtime.backends.tensorrt_module import Flavour
from vqbet_edge.runtime.manifest import StageName

_MAX_RECORD_BYTES = 1 << 16
_MAX_PLAN_BYTES = 1 << 33


class BuildOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """How an engine is built: scratch memory in MiB, None leaves it to TensorRT; level 0 to 5."""

    workspace_mb: int | None = None
    optimization_level: int = 3


class EngineKey(Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine was built from and for; two engines with one key are interchangeable.

    `driver` is that of CUDA and the kernel module; `options` None matches every way of building.
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
    def folder(self) -> str:
        """Within the cache."""
        return f"engines/{self.device}"

    @property
    def file_stem(self) -> str:
        """File name without extension."""
        return f"{self.stage}-{self.graph_sha256[:16]}"


class EngineRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What stands beside a plan: its whole key, digest and bytes, and what building it took."""

    key: EngineKey
    plan_sha256: str
    size: int
    build_seconds: float


@dataclass(frozen=True)
class Lookup:
    """The plan and its path, or None and the reason in one line."""

    plan: bytes | None
    path: Path | None
    reason: str


class EngineCache:
    """The engines in the cache: $VQBET_EDGE_CACHE, else this user's."""

    def find(self, key: EngineKey) -> Lookup:
        """Look an engine up; never raises for what is wrong with an engine."""
        record = user_cache() / key.folder / f"{key.file_stem}.json"
        try:
            plan = _load(record, key)
        except RejectedError as error:
            return Lookup(None, None, str(error))
        return Lookup(plan, record.with_suffix(".plan"), "")

    def store(self, key: EngineKey, plan: bytes, build_seconds: float) -> Path:
        """Keep an engine that was just built here, or raise DiskError; returns the plan's path."""
        record = EngineRecord(key, hashlib.sha256(plan).hexdigest(), len(plan), build_seconds)
        text = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
        folder = private_user_cache(key.folder)
        sweep(folder)
        write_private(folder / f"{key.file_stem}.plan", plan)
        # The record names the plan's digest, so dying between the two leaves a pair that is
        # detected, never one that is believed.
        write_private(folder / f"{key.file_stem}.json", text)
        return folder / f"{key.file_stem}.plan"


def read_record(path: Path) -> EngineRecord:
    """A record that only root or this user can have written; else a RejectedError says why not."""
    check_folder(path.parent)
    try:
        return msgspec.json.decode(read_private(path, _MAX_RECORD_BYTES), type=EngineRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RejectedError(f"the engine's record is damaged ({error})") from error


def _load(path: Path, key: EngineKey) -> bytes:
    """The plan of a record, after every check; otherwise a RejectedError with the reason."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        text = f"no engine has been built for this device in '{path.parent}'"
        raise RejectedError(text) from error
    except OSError as error:  # such as another user's home
        raise RejectedError(f"'{path}' cannot be read ({error.strerror})") from error
    record = read_record(path)
    for name in key.__struct_fields__:
        have, need = getattr(record.key, name), getattr(key, name)
        if have != need and not (name == "options" and need is None):
            raise RejectedError(f"it was built for {name} {have}, needed is {need}")
    plan = read_private(path.with_suffix(".plan"), min(record.size, _MAX_PLAN_BYTES))
    if hashlib.sha256(plan).hexdigest() != record.plan_sha256:
        raise RejectedError("the engine is truncated or altered")
    return plan
