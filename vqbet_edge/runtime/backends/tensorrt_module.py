"""TensorRT under either of its names; what the installed module has is asked, never assumed.

`tensorrt` comes with JetPack and with the drivers' packages, `tensorrt_rtx` is NVIDIA's TensorRT
for RTX. Their Python interfaces agree in everything that is used here, from 10.3 on.
"""

import functools
import importlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vqbet_edge.errors import BackendError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")

# Graphs are of opset 20 and strongly typed; TensorRT for RTX has versions of its own.
_OLDEST = 10
_LOG = logging.getLogger(__name__)
_INSTALL = {
    "tensorrt": "on a Jetson it comes with JetPack ('sudo apt install python3-libnvinfer'), "
    "elsewhere: pip install tensorrt",
    "tensorrt_rtx": "install it with: pip install tensorrt-rtx",
}


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT, the module's name and the version that it reports."""

    module: Any
    flavour: Flavour
    version: str


def import_tensorrt(flavour: Flavour | None = None) -> TensorRT:
    """Import this flavour; None takes `tensorrt` where it is installed, else `tensorrt_rtx`.

    Raises:
        BackendError: it is not installed, cannot be loaded, or is too old.
    """
    reasons = []
    for name in FLAVOURS if flavour is None else (flavour,):
        try:
            module = importlib.import_module(name)
        except MemoryError:
            raise  # says nothing of TensorRT
        except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
            reasons.append(f"{name}: {error} ({_INSTALL[name]})")
            continue
        version = str(module.__version__)
        major = version.partition(".")[0]
        if name == "tensorrt" and (not major.isdigit() or int(major) < _OLDEST):
            raise BackendError(
                f"TensorRT {version} is too old: the graphs are of ONNX opset 20, which it does "
                f"not know; expected {_OLDEST}.3 or newer: with JetPack 5 or 6.0, flash "
                "JetPack 6.1 or newer"
            )
        return TensorRT(module, name, version)
    raise BackendError("TensorRT cannot be imported; " + "; ".join(reasons))


class ProcessLog:
    """What TensorRT logs in this process.

    TensorRT takes the first logger that it is given, ignores every other, and keeps it for ever; so
    there is one, and it knows of no backend.
    """

    def __init__(self, tensorrt: TensorRT) -> None:
        self._errors: deque[str] = deque(maxlen=16)
        self.logger = create_logger(tensorrt, self._take)

    def _take(self, severity: str, message: str) -> None:
        severe = severity in {"ERROR", "INTERNAL_ERROR"}
        if severe:
            self._errors.append(message.strip())
        _LOG.log(logging.ERROR if severe else logging.DEBUG, "%s", message)

    def last_error(self) -> str | None:
        """The latest error, once."""
        return self._errors.pop() if self._errors else None


@functools.cache
def process_log(tensorrt: TensorRT) -> ProcessLog:
    """The one log of this TensorRT in this process."""
    return ProcessLog(tensorrt)


def create_logger(tensorrt: TensorRT, sink: Callable[[str, str], None]) -> Any:  # noqa: ANN401
    """An `ILogger` for builder, parser and runtime.

    `sink` is called with severity (VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR) and message,
    from TensorRT's threads too.
    """
    base: Any = tensorrt.module.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            sink(severity.name, message)

    return Logger()
