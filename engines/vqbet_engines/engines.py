"""All engines of a bundle: built for this device and kept, or ahead of time and only reported."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from vqbet_edge.runtime.backends.cuda import Device
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
from vqbet_edge.runtime.backends.private_files import (
    RejectedError,
    private_user_cache,
    read_private,
    write_private,
)
from vqbet_edge.runtime.backends.tensorrt import engine_key
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Precision, StageName
from vqbet_engines.builder import Built, Job, build_plan
from vqbet_engines.layers import Layer, parse_layers

_MAX_TIMING_BYTES = 1 << 26  # a few hundred KiB for the largest policy


class EngineReport(Struct, frozen=True):
    """One engine.

    Attributes:
        stage: which of the bundle's.
        precision: of the graph.
        target: GPU's name, or the compute capability that was built for ahead of time.
        tensorrt: flavour and version.
        seconds: of parsing and building; 0 when the engine was there already.
        size: bytes.
        path: where it is kept; None ahead of time.
        layers: what TensorRT made of the graph; empty when the engine was there already.
    """

    stage: StageName
    precision: Precision
    target: str
    tensorrt: str
    seconds: float
    size: int
    path: str | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class EngineBuilder:
    """Builds a bundle's engines.

    Attributes:
        bundle: the verified bundle.
        tensorrt: which TensorRT builds.
        options: how.
        console: shows what is built and how far it is.
    """

    bundle: Bundle
    tensorrt: TensorRT
    options: BuildOptions
    console: Console

    def build_for(self, device: Device, *, force: bool) -> Iterator[EngineReport]:
        """Build what the cache lacks for this device, or all with `force`.

        Raises:
            BackendError: TensorRT refuses a graph.
            DiskError: an engine cannot be kept.
        """
        cache, timing = EngineCache(), _TimingCache(self.tensorrt, device)
        for stage in self.bundle.stages_to_load:
            key = engine_key(self.bundle, stage, self.tensorrt, device, self.options)
            found = cache.find(key)
            if found.path is not None and not force:
                yield self._report(stage, device.name, len(found.plan or b""), found.path)
                continue
            why = found.reason or "as you asked"
            self.console.print(f"building {stage}: {why}", highlight=False, markup=False)
            built = self._build(stage, None, timing.read())
            timing.write(built.timing_cache)
            path = cache.store(key, built.plan, built.seconds)
            yield self._report(stage, device.name, len(built.plan), path, built)

    def build_ahead(self, compute_capability: str) -> Iterator[EngineReport]:
        """Build for a GPU that need not be here, and keep nothing.

        Raises:
            BackendError: TensorRT refuses a graph or cannot build for that GPU.
        """
        for stage in self.bundle.stages_to_load:
            built = self._build(stage, compute_capability, b"")
            yield self._report(stage, compute_capability, len(built.plan), None, built)

    def _build(self, stage: StageName, capability: str | None, timing_cache: bytes) -> Built:
        job = Job(self.tensorrt.flavour, self.options, capability)
        with self.console.status(stage) as status:
            return build_plan(
                self.bundle.graph(stage),
                job,
                timing_cache,
                lambda doing: status.update(Text(f"{stage}: {doing}")),
            )

    def _report(
        self,
        stage: StageName,
        target: str,
        size: int,
        path: Path | None,
        built: Built | None = None,
    ) -> EngineReport:
        return EngineReport(
            stage=stage,
            precision=self.bundle.manifest.stages[stage].precision,
            target=target,
            tensorrt=f"{self.tensorrt.flavour} {self.tensorrt.version}",
            seconds=0.0 if built is None else built.seconds,
            size=size,
            path=None if path is None else str(path),
            layers=() if built is None else parse_layers(built.layers),
        )


class _TimingCache:
    """What TensorRT measured on this device: makes the next build faster, is data, not code.

    TensorRT parses it in native code, so it is read only when nobody else can have written it.
    """

    def __init__(self, tensorrt: TensorRT, device: Device) -> None:
        name = f"{tensorrt.flavour}-{tensorrt.version}-{device.name}-{device.driver}"
        self._name = f"{name.replace('/', '-').replace(' ', '-')}.cache"

    def read(self) -> bytes:
        try:
            return read_private(private_user_cache("timing") / self._name, _MAX_TIMING_BYTES)
        except RejectedError:
            return b""  # the build takes longer and then writes a good one

    def write(self, data: bytes) -> None:
        if data:
            write_private(private_user_cache("timing") / self._name, data)
