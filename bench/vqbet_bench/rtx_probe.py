"""Whether TensorRT for RTX runs on this GPU, whose compute capability it may not list.

Each attempt is a process of its own (`python -m vqbet_bench.rtx_probe BUNDLE TARGET`): an engine
for another GPU may end the process. TARGET is `current` or a compute capability such as `sm80`.
"""

import sys
from pathlib import Path

from vqbet_engines.builder import Job, build_plan

from vqbet_edge.cli import run
from vqbet_edge.errors import BackendError
from vqbet_edge.runtime.backends.cuda import create_cuda
from vqbet_edge.runtime.backends.tensorrt_module import create_logger, import_tensorrt
from vqbet_edge.runtime.bundle import Bundle


def probe(bundle: Bundle, target: str) -> str:
    """Build the code heads for `target`, load them and run them once on zeros.

    Raises:
        BackendError: it fails, with what TensorRT said.
    """
    tensorrt, cuda = import_tensorrt("tensorrt_rtx"), create_cuda()
    capability = None if target == "current" else target
    job = Job("tensorrt_rtx", compute_capability=capability)
    plan = build_plan(bundle.graph("code_heads"), job).plan
    said: list[str] = []
    runtime = tensorrt.module.Runtime(
        create_logger(tensorrt, lambda severity, text: said.append(f"{severity}: {text}"))
    )
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise BackendError(f"{target}: cannot be loaded; " + " | ".join(said[-3:]))
    spec = bundle.manifest.stages["code_heads"]
    for tensor in (*spec.inputs, *spec.outputs):
        context.set_tensor_address(tensor.name, cuda.device_memory(1 << 20))
    if not context.execute_async_v3(cuda.stream):
        raise BackendError(f"{target}: cannot be run; " + " | ".join(said[-3:]))
    cuda.synchronize()
    device = cuda.device
    return f"{target}: runs on {device.name} (compute capability {device.compute_capability})"


def main() -> None:
    """Entry point."""
    bundle, target = Bundle.open(Path(sys.argv[1])), sys.argv[2]
    run(lambda: print(probe(bundle, target)))  # noqa: T201


if __name__ == "__main__":
    main()
