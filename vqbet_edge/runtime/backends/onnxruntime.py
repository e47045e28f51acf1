"""ONNX Runtime on the CPU: the backend that runs anywhere."""

import contextlib
import functools
import logging
from types import ModuleType
from typing import Any

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cpu import CpuBackend
from vqbet_edge.runtime.backends.cpu_batches import Arrays, Run
from vqbet_edge.runtime.backends.kernels import has_kernel_for_blocks
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.extras import install_command
from vqbet_edge.runtime.manifest import StageName

# The operator of INT8 transformers, as it is spelled in a graph.
_BLOCKS = b"MatMulNBits"
_LOG = logging.getLogger(__name__)


def import_onnxruntime() -> ModuleType:
    """The library.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnxruntime  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise _broken(error) from error
        raise BackendError(
            f"the backend 'onnxruntime' is not installed; install it with: {install_command('cpu')}"
        ) from error
    # NumPy and ONNX Runtime raise what they like when their compiled parts do not fit together.
    except Exception as error:
        raise _broken(error) from error
    module: ModuleType = onnxruntime
    return module


def _broken(error: Exception) -> BackendError:
    """Installed, but it does not load: another wheel beside it would not help."""
    from importlib import metadata  # noqa: PLC0415 - slow to load

    found = []
    for name in ("onnxruntime", "onnxruntime-gpu", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    numpy_is_too_new = "NumPy 1.x" in str(error) or "numpy.core.multiarray" in str(error)
    fix = (
        "it was built for NumPy 1: pip install 'numpy<2'"
        if numpy_is_too_new
        else "reinstall the same package that is there, in the same environment"
    )
    return BackendError(
        f"ONNX Runtime is installed but cannot be loaded ({', '.join(found)}): {error}; {fix}"
    )


class _Session:
    """One graph in ONNX Runtime."""

    def __init__(self, stage: StageName, data: bytes) -> None:
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
            fix = (
                "; an INT8 transformer needs ONNX Runtime 1.22 or newer, here is "
                f"{ort.__version__}: pip install --upgrade onnxruntime"
                if _BLOCKS in data
                else ""
            )
            raise BackendError(f"ONNX Runtime refuses {self._stage}.onnx: {error}{fix}") from error

    @property
    def free_batch(self) -> bool:
        """Whether it takes several windows at once: free axes have names, fixed ones numbers."""
        return isinstance(self._session.get_inputs()[0].shape[0], str)

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

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        ort = import_onnxruntime()
        if _BLOCKS in bundle.cpu_graph("gpt") and not has_kernel_for_blocks(ort):
            _LOG.warning(
                "the INT8 transformer takes several times as long as one in float32: this ONNX "
                "Runtime (%s) has no fast kernel for it on this processor; pip install --upgrade "
                "onnxruntime, or export with --fp32",
                ort.__version__,
            )

    def _load(self, stage: StageName, data: bytes) -> _Session:
        return _Session(stage, data)
