"""Inference backends: who runs the bundle's graphs."""

from typing import Literal, get_args

from vqbet_edge.backends.base import Backend
from vqbet_edge.bundle import Bundle
from vqbet_edge.errors import UsageError

BackendName = Literal["auto", "onnxruntime"]


def create_backend(name: BackendName, bundle: Bundle) -> Backend:
    """Load a bundle into a backend.

    Raises:
        UsageError: the name is unknown.
        BackendError: the backend's library is missing or refuses the bundle.
    """
    match name:
        case "auto" | "onnxruntime":
            from vqbet_edge.backends.onnxruntime import OnnxRuntimeBackend  # noqa: PLC0415

            return OnnxRuntimeBackend(bundle)
        case _:
            raise UsageError(
                f"unknown backend '{name}'; use one of {', '.join(get_args(BackendName))}"
            )
