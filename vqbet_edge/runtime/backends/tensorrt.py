"""TensorRT: engines built on this device, run as one CUDA graph."""

import logging
import subprocess
from typing import Any

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.child import module_command
from vqbet_edge.runtime.backends.cuda import Cuda, Device, Launch, create_cuda, switch
from vqbet_edge.runtime.backends.cuda_backend import Borders, CudaBackend, check_borders
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache, EngineKey
from vqbet_edge.runtime.backends.tensorrt_module import TensorRT, create_logger, import_tensorrt
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName, StageSpec

BUILD_VARIABLE = "VQBET_EDGE_BUILD_ENGINES"
_LOG = logging.getLogger(__name__)
_SEVERE = ("ERROR", "INTERNAL_ERROR")


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
    """One engine and one execution context per stage.

    Args:
        bundle: the verified bundle.
        build: build engines that are missing, unless $VQBET_EDGE_BUILD_ENGINES is 0.
        cuda: the device; None opens device 0.
        tensorrt: the module; None takes the installed one.

    Raises:
        BackendError: TensorRT, a CUDA library or the GPU is missing, or an engine is missing or
            not to be trusted and may not be built.
    """

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        *,
        build: bool = True,
        cuda: Cuda | None = None,
        tensorrt: TensorRT | None = None,
    ) -> None:
        self._tensorrt = tensorrt or import_tensorrt()
        cuda = cuda or create_cuda()
        self._errors: list[str] = []
        self._engines: list[Any] = []  # an execution context does not own its engine
        self._logger = create_logger(self._tensorrt, self._log)
        self._runtime = self._tensorrt.module.Runtime(self._logger)
        self._plans = _plans(bundle, self._tensorrt, cuda.device, build=build)
        super().__init__(bundle, cuda, capture=True)

    def _log(self, severity: str, message: str) -> None:
        if severity in _SEVERE:
            self._errors.append(message)
        _LOG.log(logging.ERROR if severity in _SEVERE else logging.DEBUG, "%s", message)

    def _create_stage(self, bundle: Bundle, stage: StageName) -> Launch:
        runtime, spec = self._runtime, bundle.manifest.stages[stage]
        # An engine may carry code for the host; ours never do.
        if hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = False
        engine = runtime.deserialize_cuda_engine(self._plans.pop(stage))
        if engine is None:
            raise self._failure(f"refuses the engine of {stage}")
        _check_borders(self._tensorrt.module, engine, stage, spec)
        self._engines.append(engine)
        context = engine.create_execution_context()
        if context is None:
            raise self._failure(f"has no memory for {stage}")
        for tensor in (*spec.inputs, *spec.outputs):
            context.set_tensor_address(tensor.name, self._buffers[tensor.name].address)
        stream = self._cuda.stream

        def enqueue() -> None:
            if not context.execute_async_v3(stream):
                raise self._failure(f"failed in {stage}")

        return enqueue

    def _failure(self, what: str) -> BackendError:
        reason = self._errors[-1] if self._errors else "it gave no reason"
        return BackendError(f"TensorRT {self._tensorrt.version} {what}: {reason}")


def _plans(
    bundle: Bundle, tensorrt: TensorRT, device: Device, *, build: bool
) -> dict[StageName, bytes]:
    engines = EngineCache(bundle.path)
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
    command = module_command("vqbet_engines.cli", str(bundle.path), "--flavour", tensorrt.flavour)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603
    if done.returncode:
        raise BackendError(
            f"the engines could not be built (exit code {done.returncode}); "
            f"try: vqbet-build '{bundle.path}'"
        )


def _check_borders(module: Any, engine: Any, stage: StageName, spec: StageSpec) -> None:  # noqa: ANN401
    have: Borders = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = _type_name(module, engine.get_tensor_dtype(name))
        have[name] = (dtype, tuple(engine.get_tensor_shape(name)))
    check_borders(f"the engine of {stage}", have, spec)


def _type_name(module: Any, dtype: Any) -> str:  # noqa: ANN401
    try:
        return str(module.nptype(dtype).__name__)
    except TypeError:  # BF16 and FP8, which NumPy lacks
        return str(dtype)
