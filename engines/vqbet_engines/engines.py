"""All engines of a bundle: built, proven and kept, or ahead of time and only reported."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from vqbet_edge.errors import VerificationError
from vqbet_edge.runtime.backends.cuda import Cuda, Device
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache, EngineKey
from vqbet_edge.runtime.backends.private_files import (
    RejectedError,
    private_user_cache,
    read_private,
    write_private,
)
from vqbet_edge.runtime.backends.tensorrt import TensorRTBackend, engine_key
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.comparison import StageResult
from vqbet_edge.runtime.manifest import Precision, StageName
from vqbet_edge.runtime.proof import Proof, prove
from vqbet_engines.builder import Built, Job, build_plan

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
        proof: how far it is from the reference, behind the stages before it; None ahead of time.
    """

    stage: StageName
    precision: Precision
    target: str
    tensorrt: str
    seconds: float
    size: int
    path: str | None
    proof: StageResult | None


@dataclass(frozen=True)
class _Engine:
    """An engine that was found, with its path, or built."""

    key: EngineKey
    plan: bytes
    path: Path | None
    built: Built | None = None


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

    def build_for(self, cuda: Cuda, *, force: bool) -> list[EngineReport]:
        """Build what the cache lacks for this device, or all with `force`; keep what is proven.

        Engines are kept together, after all of them have acted the bundle's reference cases out. No
        context is open here before every builder's process has ended: small boards have no memory
        for two.

        Raises:
            BackendError: TensorRT refuses a graph.
            BundleError: the bundle has no reference cases.
            DiskError: an engine cannot be kept.
            VerificationError: the engines compute something else; none is kept.
        """
        ReferenceCases.of(self.bundle)  # an error of theirs need not wait for minutes
        timing = _TimingCache(self.tensorrt, cuda.device)
        engines = {
            stage: self._engine(stage, cuda.device, timing, force=force)
            for stage in self.bundle.stages_to_load
        }
        self._say("proving the engines by the bundle's reference cases")
        plans = {stage: engine.plan for stage, engine in engines.items()}
        proof = prove_plans(self.bundle, self.tensorrt, cuda, plans)
        for what, figures in proof.table():
            self._say(f"{what}: {figures}")
        return [
            self._report(stage, cuda.device.name, len(engine.plan), _kept(engine), engine.built,
                         proof.stages[stage])
            for stage, engine in engines.items()
        ]  # fmt: skip

    def build_ahead(self, compute_capability: str) -> Iterator[EngineReport]:
        """Build for a GPU that need not be here, and keep nothing.

        Raises:
            BackendError: TensorRT refuses a graph or cannot build for that GPU.
        """
        for stage in self.bundle.stages_to_load:
            built = self._build(stage, compute_capability, b"")
            yield self._report(stage, compute_capability, len(built.plan), None, built)

    def _engine(
        self, stage: StageName, device: Device, timing: "_TimingCache", *, force: bool
    ) -> _Engine:
        """From the cache, or built."""
        key = engine_key(self.bundle, stage, self.tensorrt, device, self.options)
        found = EngineCache().find(key)
        if found.plan is not None and not force:
            return _Engine(key, found.plan, found.path)
        self._say(f"building {stage}: {found.reason or 'as you asked'}")
        built = self._build(stage, None, timing.read())
        timing.write(built.timing_cache)
        return _Engine(key, built.plan, None, built)

    def _build(self, stage: StageName, capability: str | None, timing_cache: bytes) -> Built:
        job = Job(self.tensorrt.flavour, self.options, capability)
        with self.console.status(stage) as status:
            return build_plan(
                self.bundle.graph(stage),
                job,
                timing_cache,
                lambda doing: status.update(Text(f"{stage}: {doing}")),
            )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _report(
        self,
        stage: StageName,
        target: str,
        size: int,
        path: Path | None,
        built: Built | None = None,
        proof: StageResult | None = None,
    ) -> EngineReport:
        return EngineReport(
            stage=stage,
            precision=self.bundle.manifest.stages[stage].precision,
            target=target,
            tensorrt=f"{self.tensorrt.flavour} {self.tensorrt.version}",
            seconds=0.0 if built is None else built.seconds,
            size=size,
            path=None if path is None else str(path),
            proof=proof,
        )


def prove_plans(
    bundle: Bundle, tensorrt: TensorRT, cuda: Cuda, plans: Mapping[StageName, bytes]
) -> Proof:
    """Run engines, kept or not, on the bundle's reference cases, and free them.

    Raises:
        BackendError: TensorRT refuses one.
        VerificationError: they compute something else.
    """
    backend = TensorRTBackend(bundle, cuda=cuda, tensorrt=tensorrt, plans=plans)
    try:
        return prove(bundle, backend)
    except VerificationError as error:
        raise VerificationError(f"{error}\nno engine that was built now is kept") from error
    finally:
        backend.close()


def _kept(engine: _Engine) -> Path | None:
    """Where it is kept, now that it is proven."""
    if engine.built is None:
        return engine.path
    return EngineCache().store(engine.key, engine.plan, engine.built.seconds)


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
