"""TensorRT: engines built on this device, run as one CUDA graph."""

import functools
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

from vqbet_edge.errors import BackendError, VerificationError
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.backends.cuda import Cuda, Device, create_cuda, switch
from vqbet_edge.runtime.backends.cuda_backend import CudaBackend
from vqbet_edge.runtime.backends.cuda_execution import Execution, Tensors, check_signature
from vqbet_edge.runtime.backends.cuda_stream import Launch, Stream
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache, EngineKey
from vqbet_edge.runtime.backends.tensorrt_module import (
    ProcessLog,
    TensorRT,
    import_tensorrt,
    process_log,
)
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName

BUILD_VARIABLE = "VQBET_EDGE_BUILD_ENGINES"


def engine_key(
    bundle: Bundle,
    stage: StageName,
    tensorrt: TensorRT,
    device: Device,
    options: BuildOptions | None = None,
) -> EngineKey:
    """The key of a stage's engine for this TensorRT on this device."""
    return EngineKey(
        stage=stage,
        graph_sha256=bundle.manifest.files[bundle.manifest.stages[stage].file].sha256,
        flavour=tensorrt.flavour,
        tensorrt=tensorrt.version,
        gpu=device.name,
        compute_capability=device.compute_capability,
        driver=device.driver,
        options=options,
    )


class TensorRTBackend(CudaBackend):
    """One engine per stage; every window has execution contexts and a stream of its own.

    Engines that are missing are built if `build`, unless $VQBET_EDGE_BUILD_ENGINES is 0; `plans`
    are such as were just built here and are not kept yet.

    Raises:
        BackendError: TensorRT, the CUDA bindings or the GPU is missing, or an engine is missing or
            not to be trusted and may not be built.
        VerificationError: engines that were built do not compute the policy.
    """

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        *,
        build: bool = True,
        cuda: Cuda | None = None,
        tensorrt: TensorRT | None = None,
        plans: Mapping[StageName, bytes] | None = None,
    ) -> None:
        self._tensorrt = tensorrt or import_tensorrt()
        cuda = cuda or create_cuda()
        # Before a context is opened here: on a small board the builder needs the memory.
        if plans is None:
            plans = _plans(bundle, self._tensorrt, cuda.device, build=build)
        self._plans = dict(plans)
        self._engines: dict[StageName, Any] = {}
        super().__init__(bundle, cuda)

    def _load(self, bundle: Bundle) -> None:
        log = process_log(self._tensorrt)
        self._failure = functools.partial(_failure, log, self._tensorrt.version)
        runtime = self._tensorrt.module.Runtime(log.logger)
        # An engine may carry code for the host; ours never do.
        if hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = False
        self._stream.on_close(self._engines.clear)
        for stage in bundle.stages_to_load:
            engine = runtime.deserialize_cuda_engine(self._plans.pop(stage))
            if engine is None:
                raise self._failure(f"refuses the engine of {stage}")
            have = _tensors(self._tensorrt.module, engine)
            check_signature(f"the engine of {stage}", have, self.signatures[stage])
            self._engines[stage] = engine

    def execution(self, stream: Stream) -> Execution:
        """Contexts of a window's own, over buffers of its own."""
        execution = Execution(self.signatures, stream)
        for stage in self._engines:
            execution.stages[stage] = self._bind(stage, execution)
        return execution

    def _bind(self, stage: StageName, execution: Execution) -> Launch:
        engine = self._engines[stage]
        bound = _Bound(engine, engine.create_execution_context())
        # The caller's is enough, and of an error's traceback nothing is freed in an order.
        del engine
        if bound.context is None:
            raise self._failure(f"has no memory for {stage}")
        for tensor in self.signatures[stage].tensors:
            address = execution.buffers[tensor.name].address
            if not bound.context.set_tensor_address(tensor.name, address):
                raise self._failure(f"refuses the memory of {tensor.name} in {stage}")
        # No reference to the backend: the stream keeps what it clears, and is the backend's.
        stream, failure = execution.stream.handle, self._failure

        def enqueue() -> None:
            if not bound.context.execute_async_v3(stream):
                raise failure(f"failed in {stage}")

        return enqueue


class _Bound(NamedTuple):
    """A context does not hold its engine and must not outlive it; tuples are freed from the end."""

    engine: Any
    context: Any


def _failure(log: ProcessLog, version: str, what: str) -> BackendError:
    reason = log.last_error() or "it gave no reason"
    return BackendError(f"TensorRT {version} {what}: {reason}")


def _plans(
    bundle: Bundle, tensorrt: TensorRT, device: Device, *, build: bool
) -> dict[StageName, bytes]:
    engines = EngineCache()
    keys = {stage: engine_key(bundle, stage, tensorrt, device) for stage in bundle.stages_to_load}
    found = {stage: engines.find(key) for stage, key in keys.items()}
    reasons = {look.reason for look in found.values() if look.plan is None}
    if reasons and build and switch(BUILD_VARIABLE, default=True):
        _build(bundle, tensorrt)
        found = {stage: engines.find(key) for stage, key in keys.items()}
        reasons = {look.reason for look in found.values() if look.plan is None}
    if reasons:
        raise BackendError(
            f"{'; '.join(sorted(reasons))}; build the engines with: vqbet-build '{bundle.path}'"
        )
    return {stage: look.plan for stage, look in found.items() if look.plan is not None}


def _build(bundle: Bundle, tensorrt: TensorRT) -> None:
    """Run `vqbet-build`, which says why it builds and shows its progress on standard error."""
    arguments = str(bundle.path), "--flavour", tensorrt.flavour
    command = module_command("vqbet_engines.build_command", *arguments)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603
    if done.returncode == VerificationError.exit_code:
        raise VerificationError(
            f"the engines that were built do not compute the policy of '{bundle.path}', and none "
            "was kept; the figures are above"
        )
    if done.returncode:
        raise BackendError(
            f"the engines could not be built (exit code {done.returncode}); "
            f"try: vqbet-build '{bundle.path}'"
        )


def _tensors(module: Any, engine: Any) -> Tensors:  # noqa: ANN401
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return {
        name: (
            _type_name(module, engine.get_tensor_dtype(name)),
            tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    }


def _type_name(module: Any, dtype: Any) -> str:  # noqa: ANN401
    try:
        return str(module.nptype(dtype).__name__)
    except TypeError:  # BF16 and FP8, which NumPy lacks
        return str(dtype)
