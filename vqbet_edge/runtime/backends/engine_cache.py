"""Engines built on this machine, and why one may not be loaded.

An engine is code: deserialising one runs what is inside. So an engine is taken only when this user
built it on this machine, for exactly this graph, TensorRT, GPU and driver; everything is checked
before TensorRT sees a byte. SECURITY.md states the stance.

    engines/<device>/<stage>-<graph>.plan     the engine
    engines/<device>/<stage>-<graph>.json     its record: key, digest, size, seal; written last
"""

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends.private_files import (
    CACHE_VARIABLE,
    RejectedError,
    create_secret,
    is_private,
    private_user_cache,
    read_private,
    sweep,
    user_cache,
    write_private,
)
from vqbet_edge.runtime.backends.tensorrt_module import Flavour
from vqbet_edge.runtime.manifest import StageName

_SEAL_NAME = "engine-seal.key"
_SEAL_BYTES = 32
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
        sweep(folder)
        write_private(folder / f"{key.file_stem}.plan", plan)
        # The record names the plan's digest, so dying between the two leaves a pair that is
        # detected, never one that is believed.
        write_private(folder / f"{key.file_stem}.json", text)
        return folder / f"{key.file_stem}.plan"

    def _folder(self, key: EngineKey) -> Path:
        roots = [self._user]
        if is_private(self._bundle) and os.access(self._bundle, os.W_OK):
            roots.insert(0, self._bundle)
        error: OSError | None = None
        for root in roots:
            folder = root / "engines" / key.device
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as failure:
                error = failure
                continue
            if is_private(folder):
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
                create_secret(path, _SEAL_BYTES)
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


def _load(folder: Path, key: EngineKey, seal_key: bytes) -> bytes:
    """The plan, after every check.

    Raises:
        RejectedError: with the reason.
    """
    if not is_private(folder):
        raise RejectedError(f"'{folder}' belongs to, or can be written by, somebody else")
    try:
        record = msgspec.json.decode(
            read_private(folder / f"{key.file_stem}.json", _MAX_RECORD_BYTES), type=EngineRecord
        )
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
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
