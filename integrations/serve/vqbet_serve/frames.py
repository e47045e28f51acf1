"""The openpi protocol's frames: MessagePack with NumPy arrays as maps.

An array is the map {b"__ndarray__": True, b"data": bytes, b"dtype": NumPy's code, b"shape": [...]}
with binary keys (`openpi_client.msgpack_numpy`). Nothing in a frame is code. What nobody asks for
is never decoded, and nothing reaches NumPy before its type, its shape and its number of bytes
agree.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import ObservationError, UsageError

#: A frame's keys and their values, which are not decoded yet.
Message: TypeAlias = dict[str, msgspec.Raw]
#: RoboArena's answer to `endpoint: reset`.
RESET_DONE = "reset successful"
#: Types that arrays may have.
DTYPES = {code: np.dtype(code) for code in ("|u1", "<f4", "<f8")}
_Shape = Annotated[list[Annotated[int, msgspec.Meta(ge=1)]], msgspec.Meta(max_length=8)]
_ENCODER = msgspec.msgpack.Encoder()
_Type = TypeVar("_Type")


def pack(message: object) -> bytes:
    """A frame: an array, or a map of arrays, numbers, texts and such maps.

    Raises:
        ObservationError: an array has another type than `DTYPES`.
    """
    return _ENCODER.encode(_plain("array", message))


def _plain(key: str, value: object) -> object:
    match value:
        case np.ndarray():
            if value.dtype.str not in DTYPES:
                raise ObservationError(
                    f"'{key}': expected uint8, float32 or float64, got {value.dtype}"
                )
            return {
                b"__ndarray__": True,
                b"data": value.tobytes(),
                b"dtype": value.dtype.str,
                b"shape": value.shape,
            }
        case Mapping():
            return {name: _plain(name, child) for name, child in value.items()}
        case _:
            return value


def unpack(frame: bytes) -> Message:
    """The keys of a frame's map.

    Raises:
        UsageError: it is no MessagePack map with texts as keys.
    """
    try:
        return _decoded(frame, Message)
    except ValueError as error:
        raise UsageError(f"expected a MessagePack map, got {error}") from error


def text(message: Message, key: str, longest: int) -> str | None:
    """A text of a frame; None where the key is missing or its value is nil.

    Raises:
        UsageError: it is none, or longer than allowed.
    """
    value: str | None = _value(message, key, str | None, f"text of 1 to {longest} characters")
    if value is not None and not 0 < len(value) <= longest:
        raise UsageError(f"'{key}': expected 1 to {longest} characters, got {len(value)}")
    return value


def number(message: Message, key: str) -> int | None:
    """A number of a frame, 0 or more; None where the key is missing or its value is nil.

    Raises:
        UsageError: it is none.
    """
    limits = Annotated[int, msgspec.Meta(ge=0)] | None
    value: int | None = _value(message, key, limits, "whole number of 0 or more")
    return value


def _value(message: Message, key: str, kind: Any, expected: str) -> Any:  # noqa: ANN401
    try:
        return _decoded(message[key], kind) if key in message else None
    except ValueError as error:
        raise UsageError(f"'{key}': expected a {expected}, got {error}") from error


def array(key: str, value: msgspec.Raw) -> NDArray[Any]:
    """An array of a frame, as a read-only view of its bytes.

    Raises:
        ObservationError: it is none, or its parts contradict each other.
    """
    try:
        parts = _decoded(value, dict[bytes, msgspec.Raw])
        marked = _decoded(parts[b"__ndarray__"], bool)
        data = _decoded(parts[b"data"], bytes)
        code = _decoded(parts[b"dtype"], str)
        shape = _decoded(parts[b"shape"], _Shape)
    except (ValueError, KeyError) as error:
        raise ObservationError(f"'{key}': expected an array, got {error}") from error
    if not marked or code not in DTYPES:
        raise ObservationError(f"'{key}': expected dtype {', '.join(DTYPES)}, got {code[:40]!r}")
    expected = math.prod(shape) * DTYPES[code].itemsize
    if len(data) != expected:
        raise ObservationError(
            f"'{key}': {code} {tuple(shape)} takes {expected} bytes, got {len(data)}"
        )
    return np.frombuffer(data, DTYPES[code]).reshape(shape)


def _decoded(data: bytes | msgspec.Raw, kind: type[_Type]) -> _Type:
    """Decode, and raise nothing but ValueError: msgspec's errors and UnicodeDecodeError are."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except RecursionError as error:
        raise ValueError("maps within maps without end") from error
