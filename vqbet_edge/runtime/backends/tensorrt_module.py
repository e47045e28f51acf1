"""TensorRT under either of its names; what the installed module has is asked, never assumed.

`tensorrt` comes with JetPack and with the drivers' packages, `tensorrt_rtx` is NVIDIA's TensorRT
for RTX. Their Python interfaces agree in everything that is used here, from 10.3 on.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from vqbet_edge.errors import BackendError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")

# What TensorRT 8.5 (JetPack 5) lacks, and what the code cannot do without.
_REQUIRED = (
    "Builder.build_serialized_network",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.set_memory_pool_limit",
    "ICudaEngine.num_io_tensors",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_tensor_address",
)
_INSTALL = {
    "tensorrt": "on a Jetson it comes with JetPack ('sudo apt install python3-libnvinfer'), "
    "elsewhere: pip install tensorrt",
    "tensorrt_rtx": "install it with: pip install tensorrt-rtx",
}


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        flavour: the module's name.
        version: as the module reports it.
    """

    module: Any
    flavour: Flavour
    version: str

    @property
    def strongly_typed(self) -> bool:
        """Whether networks can take every type from the graph (TensorRT 9 and newer)."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def import_tensorrt(flavour: Flavour | None = None) -> TensorRT:
    """Import TensorRT.

    Args:
        flavour: which one; None takes `tensorrt` where it is installed, else `tensorrt_rtx`.

    Raises:
        BackendError: it is not installed, cannot be loaded, or is older than 8.6.
    """
    reasons = []
    for name in FLAVOURS if flavour is None else (flavour,):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error} ({_INSTALL[name]})")
            continue
        return _checked(TensorRT(module, name, str(module.__version__)))
    raise BackendError("TensorRT cannot be imported; " + "; ".join(reasons))


def _checked(tensorrt: TensorRT) -> TensorRT:
    try:
        attrgetter(*_REQUIRED)(tensorrt.module)
    except AttributeError as error:
        raise BackendError(
            f"TensorRT {tensorrt.version} is too old ({error}); "
            "use 10.3 or newer (JetPack 6.1 or newer)"
        ) from error
    return tensorrt


def create_logger(tensorrt: TensorRT, sink: Callable[[str, str], None]) -> Any:  # noqa: ANN401
    """A logger for builder, parser and runtime.

    Args:
        tensorrt: the module to log for.
        sink: called with severity (VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR) and message,
            from TensorRT's threads too.

    Returns:
        An `ILogger`.
    """
    base: Any = tensorrt.module.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            sink(severity.name, message)

    return Logger()
