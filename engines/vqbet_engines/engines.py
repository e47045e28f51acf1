"""All engines of a bundle: built, proven and kept, or ahead of time and only reported."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from vqbet_edge.errors import VerificationError
from vqbet_edge.runtime.backends.cuda import Cuda, Device
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache
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
    path: str | None = None
    proof: StageResult | None = None


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
        cache, device = EngineCache(), cuda.device
        keys = {
            stage: engine_key(self.bundle, stage, self.tensorrt, device, self.options)
            for stage in self.bundle.stages_to_load
        }
        found = {stage: cache.find(key) for stage, key in keys.items()}
        plans = {stage: each.plan for stage, each in found.items() if each.plan and not force}
        built: dict[StageName, Built] = {}
        for stage in [stage for stage in keys if stage not in plans]:
            self._say(f"building {stage}: {found[stage].reason or 'as you asked'}")
            built[stage] = self._build(stage, None, read_timing(self.tensorrt, device))
            write_timing(self.tensorrt, device, built[stage].timing_cache)
        self._say("proving the engines by the bundle's reference cases")
        plans |= {stage: each.plan for stage, each in built.items()}
        proof = prove_plans(self.bundle, self.tensorrt, cuda, plans)
        for what, figures in proof.table():
            self._say(f"{what}: {figures}")
        paths = {stage: found[stage].path for stage in keys}
        paths |= {s: cache.store(keys[s], new.plan, new.seconds) for s, new in built.items()}
        seconds = dict.fromkeys(keys, 0.0) | {stage: new.seconds for stage, new in built.items()}
        return [
            self._report(stage, device.name, seconds[stage], len(plans[stage]), str(path), proof)
            for stage, path in paths.items()
        ]

    def build_ahead(self, compute_capability: str) -> Iterator[EngineReport]:
        """Build for a GPU that need not be here, and keep nothing.

        Raises:
            BackendError: TensorRT refuses a graph or cannot build for that GPU.
        """
        for stage in self.bundle.stages_to_load:
            built = self._build(stage, compute_capability, b"")
            yield self._report(stage, compute_capability, built.seconds, len(built.plan))

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
        self, stage: StageName, target: str, seconds: float, size: int,
        path: str | None = None, proof: Proof | None = None,
    ) -> EngineReport:  # fmt: skip
        precision = self.bundle.manifest.stages[stage].precision
        tensorrt = f"{self.tensorrt.flavour} {self.tensorrt.version}"
        figures = None if proof is None else proof.stages[stage]
        return EngineReport(stage, precision, target, tensorrt, seconds, size, path, figures)


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


def read_timing(tensorrt: TensorRT, device: Device) -> bytes:
    """What TensorRT measured on this device: makes the next build faster, is data, not code.

    TensorRT parses it in native code, so it is read only when nobody else can have written it.
    """
    place = private_user_cache("timing") / _timing_name(tensorrt, device)
    try:
        return read_private(place, _MAX_TIMING_BYTES)
    except RejectedError:
        return b""  # the build takes longer and then writes a good one


def write_timing(tensorrt: TensorRT, device: Device, data: bytes) -> None:
    """Keep it for the next build; TensorRT for RTX measures nothing."""
    if data:
        write_private(private_user_cache("timing") / _timing_name(tensorrt, device), data)


def _timing_name(tensorrt: TensorRT, device: Device) -> str:
    name = f"{tensorrt.flavour}-{tensorrt.version}-{device.name}-{device.driver}"
    return f"{name.replace('/', '-').replace(' ', '-')}.cache"
