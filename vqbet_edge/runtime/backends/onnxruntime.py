"""ONNX Runtime on the CPU: the backend that runs anywhere."""

import functools
from types import ModuleType
from typing import Any

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cpu import Arrays, CpuBackend, Run
from vqbet_edge.runtime.manifest import StageName, StageSpec


def import_onnxruntime() -> ModuleType:
    """The library.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise BackendError(
            "the backend 'onnxruntime' is not installed; "
            "install it with: pip install 'vqbet-edge[cpu]'"
        ) from error
    module: ModuleType = onnxruntime
    return module


class _Session:
    """One graph in ONNX Runtime."""

    def __init__(self, stage: StageName, data: bytes, spec: StageSpec) -> None:
        self._stage, ort = stage, import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Every session has threads of its own, and spinning ones would take the cores from the next
        # stage: left alone, a re-planning step takes twice as long. Without any spinning it takes
        # a fifth longer.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            # It keeps the file for a fallback that is off: as much memory again as the weights.
            self._session._model_bytes = None  # noqa: SLF001
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses {spec.file}: {error}") from error

    def bind(self, inputs: Arrays, outputs: Arrays) -> Run:
        """Tie the session to fixed arrays, which the result keeps alive."""
        binding = self._session.io_binding()
        try:
            for name, array in inputs.items():
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses {self._stage}: {error}") from error
        return functools.partial(self._run, binding, (inputs, outputs))

    def _run(self, binding: Any, _: object) -> None:  # noqa: ANN401
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._stage}: {error}") from error


class OnnxRuntimeBackend(CpuBackend):
    """One session per stage."""

    name = "onnxruntime"

    def _load(self, stage: StageName, data: bytes, spec: StageSpec) -> _Session:
        return _Session(stage, data, spec)
