"""ONNX Runtime on the CPU: the backend that runs anywhere."""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.backends.base import Backend, Floats, Frames, HeadOutputs
from vqbet_edge.bundle import Bundle
from vqbet_edge.errors import BackendError
from vqbet_edge.manifest import StageName


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


class _Stage:
    """One graph with its inputs and outputs bound to fixed arrays."""

    def __init__(
        self,
        bundle: Bundle,
        stage: StageName,
        arrays: dict[str, NDArray[Any]],
        seconds: dict[str, float],
    ) -> None:
        self._name, self._seconds = stage, seconds
        ort, spec = import_onnxruntime(), bundle.manifest.stages[stage]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Every session has threads of its own, and spinning ones would take the cores from the next
        # stage: left alone, a re-planning step takes twice as long. Without any spinning it takes
        # a fifth longer.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(
                bundle.graph(stage), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            self._binding = self._session.io_binding()
            for tensor in spec.inputs:
                self._bind(self._binding.bind_input, tensor.name, arrays[tensor.name])
            for tensor in spec.outputs:
                self._bind(self._binding.bind_output, tensor.name, arrays[tensor.name])
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses {spec.file}: {error}") from error

    @staticmethod
    def _bind(bind: Callable[..., None], name: str, array: NDArray[Any]) -> None:
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> None:
        """Run the graph from its bound inputs to its bound outputs."""
        start = time.perf_counter()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._name}: {error}") from error
        self._seconds[self._name] = time.perf_counter() - start


class OnnxRuntimeBackend(Backend):
    """Four sessions over arrays that are allocated once."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        # A tensor that leaves one graph and enters the next is one array under both names.
        arrays: dict[str, NDArray[Any]] = {}
        for stage in bundle.stages_to_load:
            spec = bundle.manifest.stages[stage]
            for tensor in (*spec.inputs, *spec.outputs):
                if tensor.name not in arrays:
                    arrays[tensor.name] = np.zeros(tensor.shape, tensor.dtype)
        self._arrays = arrays
        self._stages = {
            stage: _Stage(bundle, stage, arrays, self.seconds) for stage in bundle.stages_to_load
        }
        self._window: Floats = arrays["image_tokens"]  # (B, N, K, D)
        self._outputs = HeadOutputs(arrays["logits"], arrays["offsets"])

    def advance(self) -> None:
        """Move every row one step into the past."""
        self._window[:, :-1] = self._window[:, 1:]

    def encode(self, frames: Frames, row: int) -> None:
        """Encode frames (B, K, H, W, 3) into a row."""
        np.copyto(self._arrays["frames"], frames)
        self._stages["vision_encoder"].run()
        self._window[:, row] = self._arrays["frame_tokens"]

    def fill(self) -> None:
        """Repeat the newest row."""
        self._window[:, :-1] = self._window[:, -1:]

    def predict(self, states: Floats) -> HeadOutputs:
        """GPT and heads over the window."""
        np.copyto(self._arrays["states"], states)
        self._stages["gpt"].run()
        self._stages["code_heads"].run()
        return self._outputs

    def decode(self, codes: NDArray[np.int64]) -> Floats:
        """Code pairs -> chunks by the RVQ decoder's graph."""
        np.copyto(self._arrays["codes"], codes)
        self._stages["rvq_decoder"].run()
        return self._arrays["decoded"]
