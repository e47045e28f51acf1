"""Engines that nothing here can load any more: after an update of TensorRT or of the driver."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vqbet_edge.errors import BackendError, DiskError, UsageError
from vqbet_edge.runtime.backends.cuda import VISIBLE_VARIABLE, Device, create_cuda
from vqbet_edge.runtime.backends.engine_cache import EngineKey, read_record
from vqbet_edge.runtime.backends.private_files import RejectedError, user_cache
from vqbet_edge.runtime.backends.tensorrt_module import FLAVOURS, TensorRT, import_tensorrt


@dataclass(frozen=True)
class Unusable:
    """An engine of the cache, its size in bytes, and what it was built for."""

    plan: Path
    size: int
    built_for: str

    def remove(self) -> None:
        """Delete it.

        Raises:
            DiskError: this user may not, or the disk fails.
        """
        try:
            # In the order opposite to writing: a plan without its record is never believed.
            self.plan.with_suffix(".json").unlink(missing_ok=True)
            self.plan.unlink(missing_ok=True)
            if not any(self.plan.parent.iterdir()):
                self.plan.parent.rmdir()
        except OSError as error:
            raise DiskError(f"cannot delete '{self.plan}': {error.strerror}") from error


def find_unusable() -> list[Unusable]:
    """The engines for another TensorRT, GPU or driver than those that are here.

    What is not where this package puts an engine, or what others may have written, is not ours.

    Raises:
        BackendError: TensorRT or the GPU is missing, so nobody knows.
        UsageError: GPUs may be hidden.
    """
    if os.environ.get(VISIBLE_VARIABLE) is not None:
        raise UsageError(
            f"{VISIBLE_VARIABLE} may hide a GPU that engines were built for; type: "
            f"env -u {VISIBLE_VARIABLE} vqbet-doctor --prune"
        )
    devices, flavours = create_cuda().visible(), list(_installed())
    return [
        Unusable(path.with_suffix(".plan"), size, _text(key))
        for path, key, size in _engines()
        if not _fits(key, flavours, devices)
    ]


def _installed() -> Iterator[TensorRT]:
    import_tensorrt()  # one at least
    for flavour in FLAVOURS:
        with suppress(BackendError):
            yield import_tensorrt(flavour)


def _engines() -> Iterator[tuple[Path, EngineKey, int]]:
    """Records of engines that stand where they were put, their keys, and the engines' sizes."""
    for path in sorted((user_cache() / "engines").glob("*/*.json")):
        try:
            record = read_record(path)
        except RejectedError:
            continue
        if path == user_cache() / record.key.folder / f"{record.key.file_stem}.json":
            yield path, record.key, record.size


def _fits(key: EngineKey, flavours: Sequence[TensorRT], devices: Sequence[Device]) -> bool:
    library = any((key.flavour, key.tensorrt) == (each.flavour, each.version) for each in flavours)
    return library and any(
        (key.gpu, key.compute_capability, key.driver)
        == (each.name, each.compute_capability, each.driver)
        for each in devices
    )


def _text(key: EngineKey) -> str:
    gpu = f"{key.gpu} ({key.compute_capability})"
    return f"{key.flavour} {key.tensorrt}, {gpu}, driver {key.driver}"
