"""OpenVINO on the CPU: for x86 and ARM computers without CUDA."""

import functools
import sys
from types import ModuleType
from typing import Any

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cpu import Arrays, CpuBackend, Run
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName, StageSpec

_OPTIONS = {
    "PERFORMANCE_HINT": "LATENCY",
    # Left alone it computes in bfloat16 where the processor can, which was never verified.
    "INFERENCE_PRECISION_HINT": "f32",
}


def import_openvino() -> ModuleType:
    """The library.

    Raises:
        BackendError: it is not installed.
    """
    # OpenVINO's converter, which nothing here uses, calls a telemetry service while it is imported.
    # A robot's control loop calls nobody.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino  # noqa: PLC0415
    except ImportError as error:
        raise BackendError(
            "the backend 'openvino' is not installed; "
            "install it with: pip install 'vqbet-edge[openvino]'"
        ) from error
    module: ModuleType = openvino
    return module


class _Model:
    """One compiled graph."""

    def __init__(self, core: Any, stage: StageName, data: bytes, spec: StageSpec) -> None:  # noqa: ANN401
        self._stage, self._tensor = stage, import_openvino().Tensor
        try:
            self._compiled = core.compile_model(core.read_model(data), "CPU", _OPTIONS)
        except Exception as error:
            raise BackendError(f"OpenVINO refuses {spec.file}: {error}") from error
        # It drops inputs that nothing depends on, such as the mask of a GPT of one block.
        self._inputs = {name for port in self._compiled.inputs for name in port.names}

    def bind(self, inputs: Arrays, outputs: Arrays) -> Run:
        """Tie a request to fixed arrays."""
        try:
            request = self._compiled.create_infer_request()
            used = {name: array for name, array in inputs.items() if name in self._inputs}
            for name, array in {**used, **outputs}.items():
                request.set_tensor(name, self._tensor(array, shared_memory=True))
        except Exception as error:
            raise BackendError(f"OpenVINO refuses {self._stage}: {error}") from error
        return functools.partial(self._run, request, (inputs, outputs))

    def _run(self, request: Any, _: object) -> None:  # noqa: ANN401
        try:
            request.start_async()
            request.wait()
        except Exception as error:
            raise BackendError(f"OpenVINO failed in {self._stage}: {error}") from error


class OpenVinoBackend(CpuBackend):
    """One compiled model per stage."""

    name = "openvino"

    def __init__(self, bundle: Bundle) -> None:
        self._core = import_openvino().Core()
        super().__init__(bundle)

    def _load(self, stage: StageName, data: bytes, spec: StageSpec) -> _Model:
        return _Model(self._core, stage, data, spec)
