"""Reading a bundle: every byte is checked against the manifest before anything parses it."""

import hashlib
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from vqbet_edge.errors import BackendError, BundleError, DiskError
from vqbet_edge.runtime import format2
from vqbet_edge.runtime.hub import local_bundle, stored
from vqbet_edge.runtime.lerobot_files import check_lerobot_files
from vqbet_edge.runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    STAGES,
    FileSpec,
    Manifest,
    StageName,
    Target,
)
from vqbet_edge.runtime.manifest_reading import decode_manifest
from vqbet_edge.runtime.signatures import check_sizes

RUNTIME_NAME = "runtime.safetensors"
# Arrays of runtime.safetensors; docs/bundle.md gives their shapes.
DECODE_TABLE = "decode_table"
SECONDARY_COLUMNS = "secondary_columns"
TOKEN_CONSTANTS, CAUSAL_MASK = "token_constants", "causal_mask"
# A graph with external data must spell this key somewhere; protobuf stores strings verbatim.
_EXTERNAL_DATA_KEY = b"location"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory.

    Attributes:
        path: the bundle's directory.
        manifest: the decoded manifest.
        contents: file name -> bytes, as many and with the digests that the manifest names.
        arrays: float32 arrays of runtime.safetensors, by name.
    """

    path: Path
    manifest: Manifest
    contents: Mapping[str, bytes]
    arrays: Mapping[str, NDArray[np.float32]]

    @classmethod
    def open(cls, source: str | os.PathLike[str], revision: str | None = None) -> "Bundle":
        """Read and verify a bundle, named as for `hub.local_bundle`.

        Raises:
            BundleError: it is no bundle, or a file differs from what the manifest says.
            DiskError: a file cannot be read.
            UsageError: a repository, and huggingface_hub is not installed.
        """
        root = local_bundle(source, revision)
        if not os.path.lexists(root / MANIFEST_NAME):
            raise BundleError(
                f"'{root}' is not a bundle: expected a directory with {MANIFEST_NAME}; "
                "make one with: vqbet-export model.safetensors -o NAME.bundle"
            )
        manifest = decode_manifest(_read_file(root / MANIFEST_NAME, MAX_MANIFEST_BYTES))
        check_sizes(manifest)
        paths, specs = [root / name for name in manifest.files], manifest.files.values()
        # Digests of hundreds of megabytes take as long as loading the graphs.
        with ThreadPoolExecutor() as pool:
            contents = dict(zip(manifest.files, pool.map(_read_checked, paths, specs), strict=True))
        for stage in (*manifest.stages.values(), *manifest.cpu_stages.values()):
            _check_graph(stage.file, contents[stage.file])
        check_lerobot_files(manifest, contents)
        return cls.of(root, manifest, contents)

    @classmethod
    def of(cls, path: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> "Bundle":
        """A bundle whose files have been checked, or were just made.

        Raises:
            BundleError: the runtime's arrays are not float32 safetensors.
        """
        arrays: Mapping[str, NDArray[np.float32]]
        arrays = load_arrays(RUNTIME_NAME, contents[RUNTIME_NAME])
        if any(array.dtype != np.float32 for array in arrays.values()):
            raise BundleError(f"{RUNTIME_NAME} has arrays that are not float32; export again")
        if manifest.format_version == 2:
            arrays = format2.with_ranges(arrays, manifest)
        return cls(path, manifest, contents, arrays)

    def without_graphs(self) -> "Bundle":
        """What acting needs once a backend holds the graphs."""
        return replace(self, contents={})

    @property
    def stages_to_load(self) -> tuple[StageName, ...]:
        """The stages that acting needs: the RVQ decoder only when it is not tabulated."""
        tabulated = DECODE_TABLE in self.arrays
        return tuple(name for name in STAGES if not (tabulated and name == "rvq_decoder"))

    def check_target(self, target: Target) -> None:
        """Raise BackendError unless there are graphs for it."""
        if target not in self.manifest.targets:
            raise BackendError(
                f"'{self.path}' has graphs for {self.manifest.targets[0]} only, expected those for "
                f"{target}; export its checkpoint without --target, or with --target {target}"
            )

    def graph(self, stage: StageName) -> bytes:
        """The ONNX graph of a stage for TensorRT."""
        return self.contents[self.manifest.graphs("tensorrt")[stage].file]

    def cpu_graph(self, stage: StageName) -> bytes:
        """The ONNX graph of a stage for CPUs."""
        return self.contents[self.manifest.graphs("cpu")[stage].file]

    def demonstrated(self, name: str, dim: int) -> NDArray[np.float32] | None:
        """float32 (2, dim): lowest and highest of `ACTION_RANGE` or `STATE_RANGE`, None: unknown.

        Raises:
            BundleError: it has another shape, is not finite, or its lowest is above its highest.
        """
        if name not in self.arrays:
            return None
        low, high = found = self.array(name, (2, dim))
        if (low > high).any():
            raise BundleError(f"the bundle's '{name}' begins above its end; export again")
        return found

    def array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array of runtime.safetensors.

        Raises:
            BundleError: it is missing, has another shape or is not finite.
        """
        array = self.arrays.get(name)
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise BundleError(
                f"the bundle lacks the array '{name}' of shape {shape} with finite values; "
                "export again"
            )
        return array


def load_arrays(name: str, data: bytes) -> dict[str, NDArray[Any]]:
    """Arrays of a bundle's safetensors file, or a BundleError with its name."""
    try:
        arrays: dict[str, NDArray[Any]] = load(data)
    except Exception as error:  # its own class, and what NumPy makes of an impossible shape
        raise BundleError(f"{name} is damaged: {error}; export again") from error
    return arrays


def _check_graph(name: str, graph: bytes) -> None:
    if _EXTERNAL_DATA_KEY in graph:
        raise BundleError(f"{name} refers to external data, which is never loaded; export again")
    # ONNX Runtime recognises its own format by these bytes, and checks it less than it checks ONNX.
    if graph[4:8] == b"ORTM":
        raise BundleError(f"{name} has ONNX Runtime's own format, expected ONNX; export again")


def _read_file(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; links are not followed but in the Hub's cache."""
    try:
        handle = os.open(stored(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:  # noqa: PTH123 - opened by descriptor
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"'{path}' is not a regular file; export again")
            if status.st_size > limit:
                raise BundleError(f"'{path.name}' is not the file that was exported: too large")
            # Not to the end: a file may grow while it is read.
            return file.read(status.st_size + 1)
    except OSError as error:
        if path.is_symlink():
            raise BundleError(f"'{path}' is a link; a bundle holds its files itself") from error
        raise DiskError(
            f"cannot read '{path}': {error.strerror}; copy the whole bundle again or export again"
        ) from error


def _read_checked(path: Path, spec: FileSpec) -> bytes:
    data = _read_file(path, spec.size)
    if len(data) != spec.size or hashlib.sha256(data).hexdigest() != spec.sha256:
        raise BundleError(
            f"'{path.name}' is not the file that was exported (expected {spec.size} bytes with "
            f"SHA-256 {spec.sha256[:12]}...); copy the bundle again or export again"
        )
    return data
