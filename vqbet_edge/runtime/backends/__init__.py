"""Inference backends: who runs the bundle's graphs."""

import logging
from collections.abc import Collection
from functools import cache
from typing import Literal, get_args

from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.runtime.backends.base import Backend, foreign_errors
from vqbet_edge.runtime.bundle import Bundle

BackendName = Literal["auto", "onnxruntime", "onnxruntime-cuda", "tensorrt"]

_LOG = logging.getLogger(__name__)
_FASTEST_FIRST: tuple[BackendName, ...] = ("tensorrt", "onnxruntime-cuda", "onnxruntime")


def create_backend(
    name: BackendName,
    bundle: Bundle,
    *,
    build: bool = True,
    require: Collection[BackendName] = (),
) -> Backend:
    """Load a bundle into a backend.

    `auto` takes TensorRT where its engines have been built, else ONNX Runtime's CUDA provider,
    else ONNX Runtime on the CPU, or the first of these that is among `require`. It says which it
    took, and at level INFO why not the better ones. `tensorrt` builds engines that are missing,
    unless `build` is false, and is the backend or an error.

    Raises:
        UsageError: a name is unknown, or not among those that are required.
        BackendError: the backend's library is missing or refuses the bundle; of `auto` with what
            each that may be taken lacks.
        VerificationError: engines that were built do not compute the policy.
    """
    known = get_args(BackendName)
    if name not in known:
        raise UsageError(f"unknown backend '{name}'; use one of {', '.join(known)}")
    if isinstance(require, str) or not set(require) <= {*_FASTEST_FIRST}:
        raise UsageError(f"expected require of {', '.join(_FASTEST_FIRST)}, got {require!r}")
    if name != "auto" and require and name not in require:
        raise UsageError(f"the backend '{name}' is none of those required: {', '.join(require)}")
    return _fastest(bundle, require) if name == "auto" else _load(name, bundle, build=build)


def _fastest(bundle: Bundle, require: Collection[BackendName]) -> Backend:
    allowed = [name for name in _FASTEST_FIRST if not require or name in require]
    reasons: list[str] = []
    for name in allowed:
        try:
            backend = _load(name, bundle, build=False)
        except VQBeTEdgeError as error:  # noqa: PERF203 - a handful
            if name == allowed[-1]:
                raise type(error)("; ".join([str(error), *reasons])) from error
            reasons.append(f"not {name}: {error}")
            _LOG.info(reasons[-1])
        else:
            _say_once(backend.name)
            return backend
    raise AssertionError


@cache
def _say_once(name: str) -> None:
    # A warning, because without configured logging nothing less is seen, and a robot that runs on
    # a slower backend unnoticed is what this is for.
    _LOG.warning("backend: %s", name)


def _load(name: BackendName, bundle: Bundle, *, build: bool) -> Backend:
    with foreign_errors(f"loading the backend '{name}'"):
        return _create(name, bundle, build=build)


def _create(name: BackendName, bundle: Bundle, *, build: bool) -> Backend:
    bundle.check_target("cpu" if name == "onnxruntime" else "tensorrt")
    # Each backend imports a library that others need not have.
    match name:
        case "tensorrt":
            from vqbet_edge.runtime.backends.tensorrt import TensorRTBackend  # noqa: PLC0415

            return TensorRTBackend(bundle, build=build)
        case "onnxruntime-cuda":
            from vqbet_edge.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend  # noqa: PLC0415

            return OnnxRuntimeCudaBackend(bundle)
        case _:
            from vqbet_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend  # noqa: PLC0415

            return OnnxRuntimeBackend(bundle)
