"""TensorRT's runtime over the fake driver; an engine's plan is the name of its stage.

A stage computes something that depends on every byte of its inputs, which is all that order,
addresses and waiting can be checked by; or the policy itself, by ONNX Runtime. Calls are counted
and fail as the driver's do.
"""

import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_driver import FakeDriver, RefusedError

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.signatures import TensorSpec, signature


class FakeTensorRT:
    """As much of the module as the backend uses."""

    def __init__(self, bundle: Bundle, driver: FakeDriver) -> None:
        self.bundle, self.driver = bundle, driver
        #: Whether what fails returns nothing, as most of TensorRT does, or raises.
        self.raises = False
        #: Stage -> what computes it; other stages mix their inputs up.
        self.sessions: dict[str, Any] = {}
        self.loggers: list[Any] = []
        self.living: weakref.WeakSet[object] = weakref.WeakSet()
        self.ILogger = type("ILogger", (), {"__init__": lambda _self: None})

    def compute(self, graphs: Mapping[Any, bytes]) -> None:
        """Let ONNX graphs compute these stages, as they are written: unoptimised."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self.sessions |= {
            stage: onnxruntime.InferenceSession(graph, options) for stage, graph in graphs.items()
        }

    def fails(self, name: str) -> bool:
        """Count a call; whether it is to fail."""
        with self.driver.lock:
            try:
                self.driver.begin(f"trt {name}", anywhere=True, captured=True)
            except RefusedError:
                self.say("ERROR", f"{name} was told to fail")
                if self.raises:
                    raise RuntimeError(f"{name} raised") from None
                return True
            return False

    def say(self, severity: str, message: str) -> None:
        for logger in self.loggers[:1]:  # every other logger is ignored
            logger.log(SimpleNamespace(name=severity), message)

    def nptype(self, dtype: Any) -> Any:
        if self.fails("nptype"):
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return SimpleNamespace(__name__=dtype)

    def Runtime(self, logger: Any) -> "Runtime":  # noqa: N802
        self.loggers.append(logger)
        if self.fails("Runtime"):  # what pybind11 makes of a factory without a product
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Runtime(self)


class Runtime:
    def __init__(self, module: FakeTensorRT) -> None:
        self.module, self.engine_host_code_allowed = module, True

    def deserialize_cuda_engine(self, plan: bytes) -> "Engine | None":
        assert self.engine_host_code_allowed is False
        assert self.module.driver.stack, "engines are loaded into the current context"
        if self.module.fails("deserialize_cuda_engine"):
            return None
        return Engine(self.module, plan.decode())


class Engine:
    def __init__(self, module: FakeTensorRT, stage: Any) -> None:
        self.module, self.stage = module, stage
        self.signature = signature(module.bundle.manifest, stage)
        self.specs = {tensor.name: tensor for tensor in self.signature.tensors}
        self.contexts = 0
        module.living.add(self)

    @property
    def num_io_tensors(self) -> int:
        return len(self.specs)

    def get_tensor_name(self, index: int) -> Any:
        return None if self.module.fails("get_tensor_name") else list(self.specs)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return self.specs[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self.module.fails("get_tensor_shape"):
            return (-1,)
        return self.specs[name].shape

    def create_execution_context(self) -> "Context | None":
        return None if self.module.fails("create_execution_context") else Context(self)

    def __del__(self) -> None:
        assert not self.contexts, "a context outlives its engine"


class Context:
    def __init__(self, engine: Engine) -> None:
        # Not the engine itself: TensorRT's contexts do not hold theirs.
        self.engine, self.module, self.stage = weakref.ref(engine), engine.module, engine.stage
        self.inputs, self.outputs = engine.signature
        self.addresses: dict[str, int] = {}
        engine.contexts += 1
        self.module.living.add(self)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.module.fails("set_tensor_address"):
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.module.fails("execute_async_v3") or len(self.addresses) < len(
            (*self.inputs, *self.outputs)
        ):
            return False
        run, misuses = weakref.WeakMethod(self.run), self.module.driver.misuses

        def work() -> None:
            living = run()
            if living is None:
                misuses.append("running a context that is gone")
            else:
                living()

        self.module.driver.put(stream, work)
        return True

    def run(self) -> None:
        if self.stage in self.module.sessions:
            session = self.module.sessions[self.stage]
            feeds = {tensor.name: self.view(tensor) for tensor in self.inputs}
            names = [tensor.name for tensor in self.outputs]
            for tensor, value in zip(self.outputs, session.run(names, feeds), strict=True):
                self.view(tensor)[...] = value
            return
        everything = [self.view(tensor).astype(np.float64).ravel() for tensor in self.inputs]
        mixed = np.concatenate(everything)
        mixed = np.cumsum(np.sin(mixed + np.arange(mixed.size)))
        for number, tensor in enumerate(self.outputs):
            out = self.view(tensor)
            values = np.resize(mixed[::-1], out.size) * (number + 1)
            out[...] = np.sin(values.reshape(out.shape))

    def view(self, tensor: TensorSpec) -> Any:
        size = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        address, memory = self.addresses[tensor.name], self.module.driver.memory
        self.module.driver.check_memory(address, size)
        start = next(a for a, m in memory.items() if a <= address < a + m.nbytes)
        bytes_ = memory[start][address - start :][:size]
        return bytes_.view(tensor.dtype).reshape(tensor.shape)

    def __del__(self) -> None:
        engine = self.engine()
        if engine is not None:
            engine.contexts -= 1
