"""The GPU and its driver, through NVIDIA's `cuda-bindings`; `cuda_stream` has the rest."""

import importlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqbet_edge.errors import BackendError

_INSTALL = "pip install cuda-bindings (with JetPack 6: pip install 'cuda-bindings<13')"
# The driver's own: GPUs that it leaves out are not there, and the first that it names is device 0.
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_LOG = logging.getLogger(__name__)


def switch(variable: str, default: bool) -> bool:
    """An environment switch: 0 turns it off, 1 on, unset leaves the default.

    Raises:
        BackendError: it has another value.
    """
    value = os.environ.get(variable) or str(int(default))
    if value not in {"0", "1"}:
        raise BackendError(f"expected {variable} to be 0 or 1, got '{value}'")
    return value == "1"


@dataclass(frozen=True)
class Device:
    """A GPU: the driver's CUDA version has the kernel module's beside it where it tells."""

    name: str
    compute_capability: str
    driver: str
    integrated: bool  # GPU and processor share their memory


class Cuda:
    """The driver and its device 0; to describe it opens no context.

    Of several GPUs, $CUDA_VISIBLE_DEVICES chooses, for every library in this process.

    Raises:
        BackendError: the bindings, the driver or the GPU is missing.
    """

    def __init__(self, driver: Any = None) -> None:  # noqa: ANN401
        self.driver = driver or _import_driver()
        self.call("cuInit", 0)
        self.ordinal = self.call("cuDeviceGet", 0)
        self.device = self._describe(self.ordinal)

    def visible(self) -> list[Device]:
        """All GPUs that the driver shows this process."""
        count = self.call("cuDeviceGetCount")
        return [self._describe(self.call("cuDeviceGet", index)) for index in range(count)]

    def call(self, function: str, *arguments: Any) -> Any:  # noqa: ANN401
        """Call the driver; its result, if it has one, or a list of them.

        Raises:
            BackendError: it failed.
        """
        try:
            status, *results = getattr(self.driver, function)(*arguments)
        except RuntimeError as error:  # libcuda cannot be loaded, or is too old for the function
            raise BackendError(f"the CUDA driver is missing or too old: {error}") from error
        if status:
            reason = str(getattr(status, "name", status))
            chosen = os.environ.get(VISIBLE_VARIABLE)
            if reason.endswith("NO_DEVICE") and chosen is not None:
                reason += f" with {VISIBLE_VARIABLE}='{chosen}', which shows no GPU of this machine"
            raise BackendError(f"{function} failed: {reason}; see vqbet-doctor")
        return results[0] if len(results) == 1 else results

    def release(self, function: str, *arguments: Any) -> None:  # noqa: ANN401
        """Call what frees something; when it fails, the rest is still to be freed."""
        try:
            self.call(function, *arguments)
        except BackendError as error:
            _LOG.debug("%s", error)

    def _describe(self, ordinal: Any) -> Device:  # noqa: ANN401
        def get(name: str) -> int:
            attribute = getattr(self.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(self.call("cuDeviceGetAttribute", attribute, ordinal))

        major, minor = get("COMPUTE_CAPABILITY_MAJOR"), get("COMPUTE_CAPABILITY_MINOR")
        name: bytes = self.call("cuDeviceGetName", 256, ordinal)
        return Device(
            name=name.split(b"\0")[0].decode(),
            compute_capability=f"{major}.{minor}",
            driver=_driver_version(self.call("cuDriverGetVersion")),
            integrated=bool(get("INTEGRATED")),
        )


def create_cuda() -> Cuda:
    """Device 0, described and not opened; see `Cuda`."""
    return Cuda()


def _import_driver() -> Any:  # noqa: ANN401
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendError(f"cuda-bindings is not usable ({error}); {_INSTALL}") from error


def _driver_version(cuda_version: int) -> str:
    """CUDA's version as the driver counts it (12060) and the kernel module's, as one text."""
    text = f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"
    if _KERNEL_MODULE.exists():
        found = re.search(r"\d+\.\d+(\.\d+)?", _KERNEL_MODULE.read_text())
        text += f" ({found[0]})" if found else ""
    return text
