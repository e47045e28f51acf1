"""The builder's process: one graph in, one engine out (started by `builder`)."""

import faulthandler
import sys
import time
import warnings
from typing import Any, BinaryIO

from vqbet_edge.errors import BackendError, VQBeTEdgeError
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT, create_logger, import_tensorrt
from vqbet_engines.messages import Failed, Finished, Job, Notice, Progress, receive, send

# TensorRT logs this before each node, and the final layers under the other heading.
_PARSING = "Parsing node: "
_LAYERS = ("Layers:", "Engine Layer Information:")
# Messages of a machine without a driver, where building ahead of time works all the same.
_HARMLESS = ("catchCudaError", "CUDA initialization failure")


class _Log:
    """Keeps TensorRT's errors and final layers; reports the node that is being parsed."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.errors: list[str] = []
        self.layers = ""

    def __call__(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            if not any(text in message for text in _HARMLESS):
                self.errors.append(message.strip())
        elif message.startswith(_PARSING):
            send(self._out, Progress(message.strip(), None, 0, 0))
        elif message.startswith(_LAYERS):
            self.layers = message


def build(job: Job, out: BinaryIO) -> Finished:
    """Parse and build the job's graph.

    Raises:
        BackendError: TensorRT is missing or refuses the graph or the options.
    """
    start = time.perf_counter()
    tensorrt, log = import_tensorrt(job.flavour), _Log(out)
    logger = create_logger(tensorrt, log)
    builder = tensorrt.module.Builder(logger)
    if builder is None:
        raise BackendError("TensorRT cannot start its builder: " + "; ".join(log.errors))
    network = _parse(tensorrt, builder, logger, log, job.graph)
    config = builder.create_builder_config()
    _configure(tensorrt, config, job, out)
    _add_profile(builder, config, network)
    # The module keeps no reference to the monitor; it must outlive the build.
    monitor = _monitor(tensorrt, config, out)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise BackendError("TensorRT cannot build the graph: " + _last(log.errors))
    return Finished(
        plan=bytes(plan),
        version=tensorrt.version,
        seconds=time.perf_counter() - start,
        layers=_inspect(tensorrt, logger, plan) if job.compute_capability is None else log.layers,
        timing_cache=_timing_cache(config),
    )


def _parse(trt: TensorRT, builder: Any, logger: Any, log: _Log, graph: bytes) -> Any:  # noqa: ANN401
    flags = trt.module.NetworkDefinitionCreationFlag
    # The flag's bit differs between versions, and bit 0 meant something else before 10.
    flag = flags.STRONGLY_TYPED if trt.strongly_typed else flags.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = trt.module.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BackendError("TensorRT cannot parse the graph: " + "; ".join(errors or log.errors))
    return network


def _parser_error(error: Any) -> str:  # noqa: ANN401
    """Description with the node's name; TensorRT 8 knows the node by its index only."""
    if hasattr(error, "node_name"):
        node = f"node '{error.node_name()}' ({error.node_operator()})"
    else:
        node = f"node {error.node()}"
    return f"{node}: {error.desc()}"


def _configure(trt: TensorRT, config: Any, job: Job, out: BinaryIO) -> None:  # noqa: ANN401
    module, options = trt.module, job.options
    if options.workspace_mb is not None:
        pool = module.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, options.workspace_mb << 20)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    # One stream: else 60 of the FP32 transformer's 190 layers are waits between streams.
    config.max_aux_streams = 0
    # An FP32 export promises FP32; TF32 has ten bits of mantissa and is on by default.
    config.clear_flag(module.BuilderFlag.TF32)
    if not trt.strongly_typed:
        send(out, Notice(f"TensorRT {trt.version} has no strongly typed networks: best effort"))
        config.set_flag(module.BuilderFlag.FP16)
    _set_capability(trt, config, job.compute_capability)
    cache = config.create_timing_cache(job.timing_cache)
    # TensorRT for RTX keeps none; a cache of another GPU is refused and a new one is started.
    if cache is not None and not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


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


def _add_profile(builder: Any, config: Any, network: Any) -> None:  # noqa: ANN401
    """Give dynamic axes the size 1; the bundle's own graphs have none."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = {t.name: tuple(max(d, 1) for d in t.shape) for t in inputs if -1 in tuple(t.shape)}
    if dynamic:
        profile = builder.create_optimization_profile()
        for name, shape in dynamic.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)


def _monitor(trt: TensorRT, config: Any, out: BinaryIO) -> Any:  # noqa: ANN401
    base: Any = getattr(trt.module, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._phases: dict[str, Progress] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._phases[phase] = Progress(phase, parent, steps, 0)
            send(out, self._phases[phase])

        def step_complete(self, phase: str, step: int) -> bool:
            start = self._phases[phase]
            send(out, Progress(phase, start.parent, start.steps, step + 1))
            return True

        def phase_finish(self, phase: str) -> None:
            start = self._phases.pop(phase)
            send(out, Progress(phase, start.parent, start.steps, start.steps))

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def _inspect(trt: TensorRT, logger: Any, plan: Any) -> str:  # noqa: ANN401
    """What the engine inspector says of an engine for this machine's GPU."""
    engine = trt.module.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError("TensorRT cannot load the engine that it built; see vqbet-doctor")
    information = engine.create_engine_inspector().get_engine_information
    return str(information(trt.module.LayerInformationFormat.JSON))


def _timing_cache(config: Any) -> bytes:  # noqa: ANN401
    cache = config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())


def _last(errors: list[str]) -> str:
    return errors[-1] if errors else "it gave no reason"


def main() -> None:
    """Answer the job on standard input through the descriptor that the command line names."""
    faulthandler.enable()
    # TensorRT for RTX marks the timing cache as deprecated; asking for it is how we find out.
    warnings.simplefilter("ignore", DeprecationWarning)
    job = receive(sys.stdin.buffer)
    if not isinstance(job, Job):
        raise SystemExit("this is the builder's own process; use vqbet-build")
    with open(int(sys.argv[1]), "wb") as out:  # noqa: PTH123 - opened by descriptor
        try:
            send(out, build(job, out))
        except VQBeTEdgeError as error:
            send(out, Failed(str(error)))


if __name__ == "__main__":
    main()
