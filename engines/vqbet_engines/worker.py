"""The builder's process: reads a graph from a folder, leaves an engine there (see `builder`)."""

import faulthandler
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import msgspec

from vqbet_edge.errors import BackendError, VQBeTEdgeError
from vqbet_edge.runtime.backends.private_files import write_private
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT, create_logger, import_tensorrt
from vqbet_engines.builder import ERROR, GRAPH, JOB, PLAN, PROGRESS, RESULT, TIMING, Job

_PARSING = "Parsing node: "  # TensorRT logs this before each node
# Messages of a machine without a driver, where building ahead of time works all the same.
_HARMLESS = ("catchCudaError", "CUDA initialization failure")


def say(text: str) -> None:
    """Print what is being done, as one line whatever a graph calls its nodes."""
    line = f"{PROGRESS}{' '.join(text.split())}\n"
    sys.stdout.buffer.write(line.encode(errors="replace"))
    sys.stdout.flush()


class _Log:
    """Keeps TensorRT's errors; says which node is being parsed."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            if not any(text in message for text in _HARMLESS):
                self.errors.append(message.strip())
        elif message.startswith(_PARSING):
            say(message)

    def reason(self) -> str:
        return self.errors[-1] if self.errors else "it gave no reason"


def build(folder: Path) -> None:
    """Build the folder's graph and leave the engine beside it.

    Raises:
        BackendError: TensorRT is missing or refuses the graph or the options.
    """
    start = time.perf_counter()
    job = msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    tensorrt, log = import_tensorrt(job.flavour), _Log()
    logger = create_logger(tensorrt, log)
    try:
        builder = tensorrt.module.Builder(logger)
    except TypeError as error:  # the bindings got none
        raise BackendError(f"TensorRT cannot start its builder: {log.reason()}") from error
    network = _parse(tensorrt, builder, logger, log, (folder / GRAPH).read_bytes())
    config = builder.create_builder_config()
    _configure(tensorrt, config, job)
    cache = config.create_timing_cache((folder / TIMING).read_bytes())
    # TensorRT for RTX keeps none; a cache of another GPU is refused and a new one is started.
    if cache is not None and not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    # The module keeps no reference to the monitor; it must outlive the build.
    monitor = config.progress_monitor = _create_monitor(tensorrt)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise BackendError(f"TensorRT cannot build the graph: {log.reason()}")
    seconds = time.perf_counter() - start
    (folder / PLAN).write_bytes(plan)
    timing = config.get_timing_cache()
    (folder / TIMING).write_bytes(b"" if timing is None else timing.serialize())
    result = {"version": tensorrt.version, "seconds": seconds}
    write_private(folder / RESULT, msgspec.json.encode(result))


def _parse(trt: TensorRT, builder: Any, logger: Any, log: _Log, graph: bytes) -> Any:  # noqa: ANN401
    flag = trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))  # the flag's bit differs between versions
    parser = trt.module.OnnxParser(network, logger)
    if not parser.parse(graph):
        reasons = [
            f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"
            for error in (parser.get_error(index) for index in range(parser.num_errors))
        ]
        raise BackendError("TensorRT cannot parse the graph: " + "; ".join(reasons or log.errors))
    return network


def _configure(trt: TensorRT, config: Any, job: Job) -> None:  # noqa: ANN401
    module, options = trt.module, job.options
    if options.workspace_mb is not None:
        pool = module.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, options.workspace_mb << 20)
    config.builder_optimization_level = options.optimization_level
    # For trtexec and Nsight Systems, which name layers by the graph's nodes then.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    # One stream: else 60 of the FP32 transformer's 190 layers are waits between streams.
    config.max_aux_streams = 0
    # An FP32 export promises FP32; TF32 has ten bits of mantissa and is on by default.
    config.clear_flag(module.BuilderFlag.TF32)
    _set_capability(trt, config, job.compute_capability)


def _set_capability(trt: TensorRT, config: Any, name: str | None) -> None:  # noqa: ANN401
    capabilities = getattr(trt.module, "ComputeCapability", None)
    if capabilities is None:
        if name is not None:
            raise BackendError(
                f"{trt.flavour} builds for this machine's GPU only; to build ahead of time for "
                f"{name}: pip install tensorrt-rtx"
            )
        return
    wanted = "CURRENT" if name is None else name.upper()
    if not hasattr(capabilities, wanted):
        known = sorted(n.lower() for n in capabilities.__members__ if n.startswith("SM"))
        raise BackendError(f"{trt.flavour} cannot build for {name}; use one of {', '.join(known)}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(capabilities, wanted), 0)


def _create_monitor(trt: TensorRT) -> Any:  # noqa: ANN401
    base: Any = trt.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        """Says which phase has come how far; raising here would cancel the build."""

        def __init__(self) -> None:
            base.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            say(f"{phase}: 0 of {steps}")

        def step_complete(self, phase: str, step: int) -> bool:
            # Nobody promises that a phase was started, or that two at a time differ in name.
            say(f"{phase}: {step + 1} of {self._steps.get(phase, '?')}")
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.get(phase, "?")
            say(f"{phase}: {steps} of {steps}")

    return Monitor()


def main() -> None:
    """Do the job in the folder that the command line names."""
    faulthandler.enable()
    # TensorRT for RTX marks the timing cache as deprecated; asking for it is how we find out.
    warnings.simplefilter("ignore", DeprecationWarning)
    folder = Path(sys.argv[1])
    try:
        build(folder)
    except VQBeTEdgeError as error:
        (folder / ERROR).write_text(str(error), encoding="utf-8")
