"""ONNX Runtime's CUDA provider: the GPU backend where there is no TensorRT."""

import numpy as np

from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda import Cuda, Launch, create_cuda
from vqbet_edge.runtime.backends.cuda_backend import Borders, CudaBackend, check_borders
from vqbet_edge.runtime.backends.onnxruntime import import_onnxruntime
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import StageName

_PROVIDER = "CUDAExecutionProvider"
_MISSING = "install it with: pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"

_TYPES = {"tensor(uint8)": "uint8", "tensor(int64)": "int64", "tensor(float)": "float32"}


class OnnxRuntimeCudaBackend(CudaBackend):
    """Sessions on one stream over fixed device buffers, each replaying its own CUDA graph.

    ONNX Runtime captures a graph per session itself, so nothing is captured around it.

    Args:
        bundle: the verified bundle.
        cuda: the device; None opens device 0.

    Raises:
        BackendError: ONNX Runtime lacks its CUDA provider, or a CUDA library or the GPU is missing.
    """

    name = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle, *, cuda: Cuda | None = None) -> None:
        self._ort = import_onnxruntime()
        if _PROVIDER not in self._ort.get_available_providers():
            raise BackendError(f"this ONNX Runtime has no CUDA provider; {_MISSING}")
        if hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()  # CUDA and cuDNN from wheels, when they are there
        super().__init__(bundle, cuda or create_cuda(), capture=False)

    def _create_stage(self, bundle: Bundle, stage: StageName) -> Launch:
        ort, spec, stream = self._ort, bundle.manifest.stages[stage], self._cuda.stream
        options, run_options = ort.SessionOptions(), ort.RunOptions()
        options.log_severity_level = 3
        # The one wait per re-plan is ours.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        provider = {
            "device_id": "0",
            "user_compute_stream": str(stream),
            "enable_cuda_graph": "1" if self._graph_wanted else "0",
            "use_tf32": "0",
        }
        try:
            session = ort.InferenceSession(
                bundle.graph(stage), options, providers=[(_PROVIDER, provider)], enable_fallback=0
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime refuses {spec.file} on the GPU: {error}") from error
        if session.get_providers()[0] != _PROVIDER:
            raise BackendError(f"ONNX Runtime cannot load its CUDA provider; {_MISSING}")
        nodes = (*session.get_inputs(), *session.get_outputs())
        have: Borders = {n.name: (_TYPES.get(n.type, n.type), tuple(n.shape)) for n in nodes}
        check_borders(f"the graph of {stage}", have, spec)
        binding = session.io_binding()
        for bind, tensors in (
            (binding.bind_input, spec.inputs),
            (binding.bind_output, spec.outputs),
        ):
            for tensor in tensors:
                address = self._buffers[tensor.name].address
                bind(tensor.name, "cuda", 0, np.dtype(tensor.dtype), tensor.shape, address)

        def enqueue() -> None:
            try:
                session.run_with_iobinding(binding, run_options)
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed in {stage}: {error}") from error

        return enqueue
