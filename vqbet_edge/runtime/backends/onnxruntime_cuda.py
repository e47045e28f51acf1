"""ONNX Runtime's CUDA provider: the GPU backend where there is no TensorRT."""

import logging
from typing import Any

import numpy as np

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda import Cuda, create_cuda
from vqbet_edge.runtime.backends.cuda_backend import CudaBackend
from vqbet_edge.runtime.backends.cuda_execution import Execution, check_signature
from vqbet_edge.runtime.backends.cuda_stream import Launch, Stream
from vqbet_edge.runtime.backends.onnxruntime import import_onnxruntime
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName

_PROVIDER = "CUDAExecutionProvider"
_MISSING = "install it with: pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
_TYPES = {"tensor(uint8)": "uint8", "tensor(int64)": "int64", "tensor(float)": "float32"}
_LOG = logging.getLogger(__name__)


class OnnxRuntimeCudaBackend(CudaBackend):
    """Sessions on one stream over one set of buffers, each replaying its own CUDA graph.

    ONNX Runtime captures a graph per session itself, for the stream and the addresses of the first
    runs. So all windows run there, one at a time, and only their histories are their own.

    Raises:
        BackendError: ONNX Runtime lacks its CUDA provider, the CUDA bindings or the GPU is missing,
            or the bundle is INT8.
    """

    name = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle, *, cuda: Cuda | None = None) -> None:
        self._ort = import_onnxruntime()
        if _PROVIDER not in self._ort.get_available_providers():
            raise BackendError(f"this ONNX Runtime has no CUDA provider; {_MISSING}")
        stages = bundle.manifest.stages
        if any(stages[stage].precision == "int8" for stage in bundle.stages_to_load):
            # Its optimiser is known to compute the same graphs wrongly on the CPU.
            raise BackendError(
                "nobody has proven that ONNX Runtime's CUDA provider computes INT8 graphs for "
                "TensorRT correctly, so it may not run them; use TensorRT, the backend "
                "'onnxruntime', or a bundle in FP16"
            )
        if hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()  # CUDA and cuDNN from wheels, when they are there
        super().__init__(bundle, cuda or create_cuda())

    def _load(self, bundle: Bundle) -> None:
        self._execution = Execution(self.signatures, self._stream)
        try:
            self._load_sessions(bundle, self.capture)
        except BackendError as error:
            if not self.capture:
                raise
            self._load_sessions(bundle, capture=False)
            _LOG.warning("acting without CUDA graphs, which is slower: %s", error)

    def _load_sessions(self, bundle: Bundle, capture: bool) -> None:
        for stage in bundle.stages_to_load:
            self._execution.stages[stage] = self._bind(bundle, stage, capture)
        self._execution.warm_up()

    def execution(self, stream: Stream) -> Execution:
        """The one of all windows."""
        del stream
        return self._execution

    def _bind(self, bundle: Bundle, stage: StageName, capture: bool) -> Launch:
        session = self._session(bundle.graph(stage), stage, capture)
        expected, buffers = self.signatures[stage], self._execution.buffers
        nodes = (*session.get_inputs(), *session.get_outputs())
        have = {n.name: (_TYPES.get(n.type, n.type), tuple(n.shape)) for n in nodes}
        check_signature(f"the graph of {stage}", have, expected)
        binding, options = session.io_binding(), self._ort.RunOptions()
        for bind, tensors in (
            (binding.bind_input, expected.inputs),
            (binding.bind_output, expected.outputs),
        ):
            for tensor in tensors:
                address = buffers[tensor.name].address
                bind(tensor.name, "cuda", 0, np.dtype(tensor.dtype), tensor.shape, address)
        # The one wait per re-plan is ours.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def enqueue() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed in {stage}: {error}") from error

        return enqueue

    def _session(self, graph: bytes, stage: StageName, capture: bool) -> Any:  # noqa: ANN401
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        provider = {
            "device_id": "0",
            "user_compute_stream": str(self._stream.handle),
            "enable_cuda_graph": "1" if capture else "0",
            "use_tf32": "0",
        }
        try:
            session = self._ort.InferenceSession(
                graph, options, providers=[(_PROVIDER, provider)], enable_fallback=0
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses {stage} on the GPU: {error}") from error
        if session.get_providers()[0] != _PROVIDER:
            raise BackendError(f"ONNX Runtime cannot load its CUDA provider; {_MISSING}")
        session._model_bytes = None  # noqa: SLF001 - kept for a fallback that is off
        return session
