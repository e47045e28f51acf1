"""The CUDA backends' own machinery on a device, without TensorRT: PyTorch computes the stages.

    python bench/gpu.py BUNDLE CHECKPOINT

The bundle is the checkpoint's, in FP32 or FP16. Wanted: pip install -e '.[export]' cuda-bindings.
Every check prints a line with what it found; one that fails does not stop the others.
"""

import functools
import itertools
import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vqbet_export.assembly import DTYPES
from vqbet_export.stages import lerobot_cuts

from vqbet_edge.errors import BackendError, VerificationError
from vqbet_edge.runtime.backends.cuda import Cuda
from vqbet_edge.runtime.backends.cuda_backend import GRAPH_VARIABLE, CudaBackend
from vqbet_edge.runtime.backends.cuda_execution import Execution
from vqbet_edge.runtime.backends.cuda_stream import MAPPED_VARIABLE, Launch, Stream
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.manifest import StageName
from vqbet_edge.runtime.proof import PolicyCheck, prove
from vqbet_edge.runtime.signatures import TensorSpec
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint


class Gpu:
    """What runs PyTorch where a driver's streams and addresses are.

    Attributes:
        cuda: the driver and its device.
        name: PyTorch's.
    """

    name = "cuda"

    def __init__(self) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.cuda = Cuda()

    def view(self, address: int, tensor: TensorSpec) -> Tensor:
        """A tensor over memory of the driver's."""
        kind = np.dtype(tensor.dtype).str
        described = {"shape": tensor.shape, "typestr": kind, "data": (address, False), "version": 3}
        holder = type("Memory", (), {"__cuda_array_interface__": described})()
        return torch.as_tensor(holder, device="cuda")

    def put(self, stream: int, run: Launch) -> None:
        """Put what `run` launches on a stream of the driver's."""
        outside = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(outside):
            run()

    def free(self) -> int:
        """Bytes of the device's memory that nobody uses."""
        torch.cuda.synchronize()
        return int(torch.cuda.mem_get_info()[0])

    def use(self) -> Any:  # noqa: ANN401
        """Use CUDA as a robot's program does between two calls; what it found, its context too."""
        total = (torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum()
        return total.item(), int(self.cuda.call("cuCtxGetCurrent"))

    def fault(self) -> None:
        """Launch what fails behind the call: an index out of range trips the kernel's assertion."""
        torch.zeros(4, device="cuda")[torch.full((1,), 99, device="cuda")]


class TorchStages(CudaBackend):
    """A bundle's stages in PyTorch, at the addresses and on the streams of the backend.

    Args:
        bundle: whose signatures and precision hold.
        checkpoint: the weights.
        device: where.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, device: Gpu) -> None:
        self._checkpoint, self._device, self.broken = checkpoint, device, False
        super().__init__(bundle, device.cuda)

    def _load(self, bundle: Bundle) -> None:
        stages, cuts = bundle.manifest.stages, lerobot_cuts(self._checkpoint).stages
        self._modules: dict[StageName, nn.Module] = {
            name: cuts[name](DTYPES[stages[name].precision]).eval().to(self._device.name)
            for name in bundle.stages_to_load
        }

    def execution(self, stream: Stream) -> Execution:
        """Modules over a window's own buffers."""
        execution = Execution(self.signatures, stream)
        for stage in self._modules:
            run = functools.partial(self._run, stage, *self._tensors(stage, execution))
            execution.stages[stage] = functools.partial(self._device.put, stream.handle, run)
        return execution

    def _tensors(self, stage: StageName, execution: Execution) -> tuple[list[Tensor], list[Tensor]]:
        view, buffers = self._device.view, execution.buffers
        inputs, outputs = self.signatures[stage]
        return (
            [view(buffers[tensor.name].address, tensor) for tensor in inputs],
            [view(buffers[tensor.name].address, tensor) for tensor in outputs],
        )

    @torch.inference_mode()
    def _run(self, stage: StageName, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if self.broken:
            self._device.fault()
        found = self._modules[stage](*inputs)
        for output, value in zip(outputs, found if len(outputs) > 1 else (found,), strict=True):
            output.copy_(value)


def loads(device: Gpu, count: int = 10_000) -> str:
    """Streams with memory and a graph, opened and closed: no byte is lost."""

    def load() -> None:
        stream = Stream(device.cuda)
        with stream.active():
            near, far = stream.buffer(1 << 16, host=True), stream.buffer(1 << 16, host=False)
            stream.synchronize()
            launch = stream.capture(lambda: stream.copy(far.address, near.address, 1 << 16))
            launch()
        stream.close()

    load()
    before = device.free()
    for _ in range(count):
        load()
    lost = before - device.free()
    if lost > count:  # less than a byte per load: other programs use the device too
        raise VerificationError(f"{count} loads lost {lost} bytes")
    return f"{count} loads, {lost} bytes lost"


def policy(bundle: Bundle, checkpoint: Checkpoint, device: Gpu) -> str:
    """The whole backend computes the policy: copied or mapped, launched or captured, two robots.

    And a program's own use of CUDA is as before, and as if it were alone.
    """
    before, said = device.use(), []
    for mapped, graphs in itertools.product("01", "01"):
        os.environ.update({MAPPED_VARIABLE: mapped, GRAPH_VARIABLE: graphs})
        backend = TorchStages(bundle, checkpoint, device)
        try:
            kept = backend.create_window()
            proof = prove(bundle, backend)
            if bool(kept._graphs) != (graphs == "1"):  # noqa: SLF001
                raise VerificationError(f"{GRAPH_VARIABLE}={graphs}: {len(kept._graphs)} graphs")  # noqa: SLF001
            if device.use() != before:
                raise VerificationError(f"another library's work: {before}, then {device.use()}")
        finally:
            backend.close()
        said.append(f"mapped {mapped}, graphs {graphs}: {proof}")
    return "\n".join(said)


def faults(bundle: Bundle, checkpoint: Checkpoint, device: Gpu) -> str:
    """What fails on the device is our error, again and again, and closing survives it.

    The device's context is of no use afterwards: a process of its own.
    """
    os.environ[GRAPH_VARIABLE] = "0"
    backend = TorchStages(bundle, checkpoint, device)
    cases, said = ReferenceCases.of(bundle), set[str]()
    check = PolicyCheck(bundle, backend, cases)
    case = cases.cases[0]
    backend.broken = True
    for _ in range(2):
        try:
            check.add(cases.observations(case, bundle.manifest), case.outputs)
        except BackendError as error:  # noqa: PERF203 - twice
            said.add(str(error))
        else:
            raise VerificationError("a fault on the device went unnoticed")
    backend.close()
    return " / ".join(sorted(said))


def main(bundle: str, checkpoint: str, device: Gpu) -> int:
    """Every check; how many failed."""
    policy_of = Bundle.open(bundle), load_checkpoint(checkpoint), device
    checks = {
        "loads": lambda: loads(device),
        "policy": lambda: policy(*policy_of),
        "faults": lambda: faults(*policy_of),  # last: it spoils this process's GPU
    }
    failed = 0
    for name, check in checks.items():
        try:
            said = check()
        except Exception as error:  # noqa: BLE001 - the others are still worth their time
            said, failed = f"FAILED: {type(error).__name__}: {error}", failed + 1
        sys.stdout.write(f"{name}: {said}\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:], Gpu()) > 0)
